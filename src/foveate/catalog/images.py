"""Attentions of image models: regions that route, and subspaces of a compact CNN's channels."""

from __future__ import annotations

from foveate.catalog.row import Capabilities, Paper, Row, Support

BIFORMER = Paper(
    "BiFormer: Vision Transformer with Bi-Level Routing Attention", "Zhu et al., 2023", "2303.08810"
)
SUBSPACES = Paper(
    "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
    "Saini et al., 2020",
    "2006.15102",
)

WHOLE_IMAGES = Support(False, "regions are of whole images or sequences")

FEATURE_MAPS = Support(False, "maps of CNNs have no heads, and no order of tokens")

ROWS: tuple[Row, ...] = (
    Row(
        key="biformer",
        kind="pattern",
        path="foveate.methods.biformer.BiLevelRouting",
        title="Bi-level routing (BiFormer)",
        summary="Regions of an image choose the regions whose tokens theirs attend to.",
        papers=(BIFORMER,),
        miniature="biformer",
        capabilities=Capabilities(
            decode=WHOLE_IMAGES,
            causal_routing=Support(False, "a region's mean query and key hold its later tokens"),
        ),
        jobs=("Attention", "models"),
    ),
    Row(
        key="ulsam",
        kind="module",
        path="foveate.methods.ulsam.ULSAM",
        title="Subspace attention (ULSAM)",
        summary="Each group of a CNN's channels is weighted by one spatial map of its own.",
        papers=(SUBSPACES,),
        miniature="ulsam",
        capabilities=Capabilities(
            prefill=FEATURE_MAPS,
            decode=FEATURE_MAPS,
            gqa=FEATURE_MAPS,
            padding=FEATURE_MAPS,
            causal_outputs=FEATURE_MAPS,
            causal_routing=FEATURE_MAPS,
        ),
        jobs=("models",),
    ),
)
