"""Sparse attentions that are trained inside the model."""

from __future__ import annotations

from foveate.catalog.row import BUILDERS, Capabilities, Paper, Row, Support

ROUTING = Paper(
    "Efficient Content-Based Sparse Attention with Routing Transformers",
    "Roy et al., 2021",
    "2003.05997",
)

ROWS: tuple[Row, ...] = (
    Row(
        key="routing-transformer",
        kind="attention",
        path="foveate.methods.routing_transformer.RoutingTransformer",
        title="Routing Transformer",
        summary="Local heads, and heads that attend within clusters learnt by online k-means.",
        papers=(ROUTING,),
        sheet="routing-transformer",
        capabilities=Capabilities(
            decode=Support(True, "each token routed among those before it, a step costs C D + w D"),
            padding=Support(True, "padding is in no cluster and moves no centroid"),
            causal_outputs=Support(True, "with members held fixed"),
            causal_routing=Support(
                False,
                "in training a later token may push an earlier one out of a cluster, as published; "
                "form='prefix', evaluation and decoding route on the past alone",
            ),
        ),
        jobs=BUILDERS,
    ),
)
