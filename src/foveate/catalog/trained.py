"""Sparse attentions that are trained inside the model."""

from __future__ import annotations

from foveate.catalog.row import BUILDERS, Capabilities, Paper, Row, Support

DMA = Paper("Trainable Dynamic Mask Sparse Attention", "Shi et al., 2025", "2508.02124")
SUPERLINEAR = Paper("Superlinear Multi-Step Attention", "Huang, 2026", "2601.18401")

CAUSAL_CHOICE = Support(False, "a query keeps the best of the keys up to itself")

ROWS: tuple[Row, ...] = (
    Row(
        key="dma",
        kind="attention",
        path="foveate.methods.dma.DMA",
        title="Dynamic mask attention",
        summary="A learnt importance, made from values, chooses the keys and is added to logits.",
        papers=(DMA,),
        sheet="dma",
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
        sheet="superlinear",
        capabilities=Capabilities(
            decode=Support(True, "reads about the square root of the cache, which stays whole"),
            bidirectional=Support(False, "anchors are earlier tokens"),
        ),
        jobs=BUILDERS,
    ),
)
