"""Attentions and mixers of another formula than the softmax."""

from __future__ import annotations

from foveate.catalog.row import BUILDERS, Capabilities, Paper, Row, Support

FLOW = Paper(
    "Flowformer: Linearizing Transformers with Conservation Flows", "Wu et al., 2022", "2202.06258"
)
GAAM = Paper(
    "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across "
    "Multiple Modalities",
    "Ioannides et al., 2024",
    "2401.11143",
)
GRASSMANN = Paper(
    "Attention Is Not What You Need: Grassmann Flows as an Attention-Free Alternative for Sequence "
    "Modeling",
    "Chong, 2025",
    "2512.19428",
)
DECONSTRUCTING = Paper(
    "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    "Xue et al., 2025",
    "2510.11602",
)
BASED = Paper(
    "Simple linear attention language models balance the recall-throughput tradeoff",
    "Arora et al., 2024",
    "2402.18668",
)

MIXERS = ("train",)
NO_HEADS = Support(False, "has no heads")

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
    Row(
        key="gaam",
        kind="mixer",
        path="foveate.methods.gaam.GAAM",
        title="Gaussian adaptive attention",
        summary="A learnt gate on how far each entry lies from the mean of its group; no tokens "
        "are compared.",
        papers=(GAAM,),
        sheet="gaam",
        capabilities=Capabilities(gqa=NO_HEADS),
        jobs=MIXERS,
    ),
    Row(
        key="grassmann",
        kind="mixer",
        path="foveate.methods.grassmann.Grassmann",
        title="Causal Grassmann layer",
        summary="Planes that a token spans with a few earlier ones, gated into it; no attention.",
        papers=(GRASSMANN,),
        sheet="grassmann",
        capabilities=Capabilities(gqa=NO_HEADS),
        jobs=MIXERS,
    ),
    Row(
        key="deconstructed-mlp",
        kind="mixer",
        path="foveate.methods.deconstructing.DeconstructedMLP",
        title="No token mixing (Deconstructing)",
        summary="A gated MLP of as many weights in attention's place; for hybrids and as a floor.",
        papers=(DECONSTRUCTING,),
        sheet="deconstructing",
        capabilities=Capabilities(gqa=NO_HEADS),
        jobs=MIXERS,
    ),
)
