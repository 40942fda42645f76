"""Layouts: which tiles each query tile visits, and which elements of partial ones."""

from foveate.ops.layout.core import FULL, KEY_RANGE, ROW_RANGE, Layout, Transposed

__all__ = ["FULL", "KEY_RANGE", "ROW_RANGE", "Layout", "Transposed"]
