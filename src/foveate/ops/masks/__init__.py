"""Masks: who may attend to whom, from positions alone; combined with `&`, `|` and `~`."""

from foveate.ops.masks.base import Mask
from foveate.ops.masks.fixed import documents, padding, prefix, sinks
from foveate.ops.masks.grid import neighborhood
from foveate.ops.masks.parse import parse_mask
from foveate.ops.masks.relative import causal, strided, window
from foveate.ops.masks.table import blocks, region

__all__ = [
    "Mask",
    "blocks",
    "causal",
    "documents",
    "neighborhood",
    "padding",
    "parse_mask",
    "prefix",
    "region",
    "sinks",
    "strided",
    "window",
]
