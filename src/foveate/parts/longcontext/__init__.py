"""The masks of the Long-Context Attention Benchmark, their forms elsewhere, document lengths."""

from foveate.parts.longcontext.forms import column_intervals, slices
from foveate.parts.longcontext.lengths import distributions, draw_documents
from foveate.parts.longcontext.masks import (
    DYNAMIC,
    EVICTION,
    FIXED,
    Settings,
    names,
    seen_by,
    settings,
)
from foveate.parts.longcontext.rows import counted, row_counts

__all__ = [
    "DYNAMIC",
    "EVICTION",
    "FIXED",
    "Settings",
    "column_intervals",
    "counted",
    "distributions",
    "draw_documents",
    "names",
    "row_counts",
    "seen_by",
    "settings",
    "slices",
]
