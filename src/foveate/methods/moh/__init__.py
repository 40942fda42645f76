"""Mixture-of-head attention: each token chooses which heads count for it."""

from foveate.methods.moh.gates import HeadRouter, QueryRouter
from foveate.methods.moh.projection import MoH, MoHProjection
from foveate.methods.moh.ragged import key_ranges, ragged_layout

__all__ = ["HeadRouter", "MoH", "MoHProjection", "QueryRouter", "key_ranges", "ragged_layout"]
