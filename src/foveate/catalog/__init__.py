"""The table of methods: one row each, and nothing else knows which methods there are.

From it come `foveate methods`, the README's table, what `compare` offers and the tests' matrix.
It holds only strings: reading it imports no method. Adding a method means adding a row to one of
the families beside this file, its mechanism file and a test of what only it does (CONTRIBUTING.md
walks through one).
"""

from __future__ import annotations

from foveate.catalog import (
    adaptive,
    blocks,
    caches,
    formulas,
    images,
    patterns,
    poolers,
    projections,
    recommend,
    retrieval,
    routers,
    sinks,
    studies,
    studies_features,
    trained,
)
from foveate.catalog.row import YES, Capabilities, Paper, Row, Support
from foveate.ops.errors import UnknownMethodError, nearest

__all__ = [
    "YES",
    "Capabilities",
    "Paper",
    "Row",
    "Support",
    "get",
    "keys",
    "markdown_table",
    "rows",
]

ROWS: tuple[Row, ...] = (
    *patterns.ROWS,
    *blocks.ROWS,
    *caches.ROWS,
    *trained.ROWS,
    *formulas.ROWS,
    *adaptive.ROWS,
    *sinks.ROWS,
    *images.ROWS,
    *projections.ROWS,
    *poolers.ROWS,
    *studies.ROWS,
    *retrieval.ROWS,
    *recommend.ROWS,
    *routers.ROWS,
    *studies_features.ROWS,
)


def rows() -> tuple[Row, ...]:
    """All rows, in the order in which people should read them."""
    return ROWS


def keys() -> tuple[str, ...]:
    """The keys of all methods."""
    return tuple(row.key for row in ROWS)


def get(key: str) -> Row:
    """The row of a method.

    Raises:
        UnknownMethodError: there is no such key; the message offers the nearest ones.
    """
    for row in ROWS:
        if row.key == key:
            return row
    raise UnknownMethodError(f"No method is called {key!r}; {nearest(key, keys())}")


def markdown_table() -> str:
    """The methods as a Markdown table, one line each."""
    head = ("key", "what it does", "paper", "prefill", "decode", "backward", "bidirectional")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in ROWS:
        can = row.capabilities
        papers = ", ".join(f"[{p.arxiv}]({p.url})" for p in row.papers)
        cells = (f"`{row.key}`", f"**{row.title}.** {row.summary}", papers) + tuple(
            str(s) for s in (can.prefill, can.decode, can.backward, can.bidirectional)
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
