"""Attentions and mixers of another formula than the softmax."""

from __future__ import annotations

from foveate.catalog.row import BUILDERS, Capabilities, Paper, Row, Support

DUVVURI = Paper(
    "LUCID: Attention with Preconditioned Representations", "Duvvuri et al., 2026", "2602.10410"
)

ROWS: tuple[Row, ...] = (
    Row(
        key="lucid",
        kind="attention",
        path="foveate.methods.lucid.Lucid",
        title="LUCID",
        summary="Any attention over values from which similar earlier keys' part is erased first.",
        papers=(DUVVURI,),
        sheet="lucid",
        capabilities=Capabilities(
            bidirectional=Support(False, "a value is prepared from those of earlier tokens")
        ),
        jobs=(*BUILDERS, "use"),
    ),
)
