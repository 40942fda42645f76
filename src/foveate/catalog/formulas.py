"""Attentions and mixers of another formula than the softmax."""

from __future__ import annotations

from foveate.catalog.row import BUILDERS, Capabilities, Paper, Row, Support

FLOW = Paper(
    "Flowformer: Linearizing Transformers with Conservation Flows", "Wu et al., 2022", "2202.06258"
)

ROWS: tuple[Row, ...] = (
    Row(
        key="flowformer",
        kind="attention",
        path="foveate.methods.flowformer.Flowformer",
        title="Flow-Attention",
        summary="Linear time; sources compete and sinks are allotted, as in a network of flows.",
        papers=(FLOW,),
        sheet="flowformer",
        capabilities=Capabilities(
            decode=Support(True, "from sums of its own, not from keys and values"),
        ),
        jobs=BUILDERS,
    ),
)
