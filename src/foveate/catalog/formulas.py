"""Attentions and mixers of another formula than the softmax."""

from __future__ import annotations

from foveate.catalog.row import Row

ROWS: tuple[Row, ...] = ()
