"""The exact op, masks, layouts, merging and backends; knows nothing above it."""

from foveate.ops.attention import attention, explain, with_key, with_sinks
from foveate.ops.bias import RelativeBias, alibi, alibi_slopes
from foveate.ops.dispatch import Explanation, available
from foveate.ops.layout import Layout
from foveate.ops.masks import (
    Mask,
    blocks,
    causal,
    documents,
    neighborhood,
    padding,
    parse_mask,
    prefix,
    region,
    sinks,
    strided,
    window,
)
from foveate.ops.merge import merge, mix
from foveate.ops.probs import apply_probs, block_sums, column_sums, diagonal_sums, probs
from foveate.ops.types import AttentionOutput

__all__ = [
    "AttentionOutput",
    "Explanation",
    "Layout",
    "Mask",
    "RelativeBias",
    "alibi",
    "alibi_slopes",
    "apply_probs",
    "attention",
    "available",
    "block_sums",
    "blocks",
    "causal",
    "column_sums",
    "diagonal_sums",
    "documents",
    "explain",
    "merge",
    "mix",
    "neighborhood",
    "padding",
    "parse_mask",
    "prefix",
    "probs",
    "region",
    "sinks",
    "strided",
    "window",
    "with_key",
    "with_sinks",
]
