"""Sparse attentions that are trained inside the model."""

from __future__ import annotations

from foveate.catalog.row import BUILDERS, Capabilities, Paper, Row, Support

COMBINER = Paper(
    "Combiner: Full Attention Transformer with Sparse Computation Cost",
    "Ren et al., 2021",
    "2107.05768",
)

SEA = Paper(
    "SEA: Sparse Linear Attention with Estimated Attention Mask", "Lee et al., 2023", "2310.01777"
)

ROWS: tuple[Row, ...] = (
    Row(
        key="sea",
        kind="attention",
        path="foveate.methods.sea.SEA",
        title="SEA",
        summary="A linear network estimates where attention goes; exact attention runs only there.",
        papers=(SEA,),
        sheet="sea",
        capabilities=Capabilities(
            decode=Support(True, "estimates each token's row from a state of fixed size"),
            padding=Support(True, "in front or behind; other masks are refused"),
            bidirectional=Support(True, "a form of its own, built with causal=False"),
        ),
        jobs=BUILDERS,
    ),
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
