"""Sparse attentions that are trained inside the model."""

from __future__ import annotations

from foveate.catalog.row import Row

ROWS: tuple[Row, ...] = ()
