"""Sparse attentions that are trained inside the model."""

from __future__ import annotations

from foveate.catalog.row import BUILDERS, Capabilities, Paper, Row, Support

DMA = Paper("Trainable Dynamic Mask Sparse Attention", "Shi et al., 2025", "2508.02124")
SUPERLINEAR = Paper("Superlinear Multi-Step Attention", "Huang, 2026", "2601.18401")

CAUSAL_CHOICE = Support(False, "a query keeps the best of the keys up to itself")

ROUTING = Paper(
    "Efficient Content-Based Sparse Attention with Routing Transformers",
    "Roy et al., 2021",
    "2003.05997",
)

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
        key="dma",
        kind="attention",
        path="foveate.methods.dma.DMA",
        title="Dynamic mask attention",
        summary="A learnt importance, made from values, chooses the keys and is added to logits.",
        papers=(DMA,),
        miniature="dma",
        capabilities=Capabilities(
            decode=Support(True, "exact, from a cache of as many keys as are kept"),
            bidirectional=CAUSAL_CHOICE,
        ),
        jobs=BUILDERS,
    ),
    Row(
        key="superlinear",
        kind="attention",
        path="foveate.methods.superlinear.Superlinear",
        title="Superlinear",
        summary="Each query scores anchors, attends in the spans before the best ones, mixes them.",
        papers=(SUPERLINEAR,),
        miniature="superlinear",
        capabilities=Capabilities(
            decode=Support(True, "reads about the square root of the cache, which stays whole"),
            bidirectional=Support(False, "anchors are earlier tokens"),
        ),
        jobs=BUILDERS,
    ),
    Row(
        key="routing-transformer",
        kind="attention",
        path="foveate.methods.routing_transformer.RoutingTransformer",
        title="Routing Transformer",
        summary="Local heads, and heads that attend within clusters learnt by online k-means.",
        papers=(ROUTING,),
        miniature="routing-transformer",
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
    Row(
        key="sea",
        kind="attention",
        path="foveate.methods.sea.SEA",
        title="SEA",
        summary="A linear network estimates where attention goes; exact attention runs only there.",
        papers=(SEA,),
        miniature="sea",
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
        miniature="combiner",
        capabilities=Capabilities(
            decode=Support(True, "from summaries of finished spans, by foveate.Attention's cache"),
            padding=Support(True, "in front or behind; other masks are refused"),
        ),
        jobs=BUILDERS,
    ),
)
