"""Sparse attentions that are trained inside the model."""

from __future__ import annotations

from foveate.catalog.row import BUILDERS, Capabilities, Paper, Row, Support

COMBINER = Paper(
    "Combiner: Full Attention Transformer with Sparse Computation Cost",
    "Ren et al., 2021",
    "2107.05768",
)

ROWS: tuple[Row, ...] = (
    Row(
        key="combiner",
        kind="attention",
        path="foveate.methods.combiner.Combiner",
        title="Combiner",
        summary="Near tokens directly, far ones through summaries of spans, in one softmax.",
        papers=(COMBINER,),
        sheet="combiner",
        capabilities=Capabilities(
            decode=Support(True, "from summaries of finished spans, by foveate.Attention's cache"),
            padding=Support(True, "in front or behind; other masks are refused"),
        ),
        jobs=BUILDERS,
    ),
)
