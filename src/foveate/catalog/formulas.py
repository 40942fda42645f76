"""Attentions and mixers of another formula than the softmax."""

from __future__ import annotations

from foveate.catalog.row import Capabilities, Paper, Row, Support

HSA = Paper(
    "Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale Problems",
    "Amizadeh et al., 2025",
    "2509.15448",
)

TIED_ROWS = Support(False, "rows of a group share its mean query; causal is ties='columns'")

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
        key="hsa",
        kind="attention",
        path="foveate.methods.hsa.HSA",
        title="Hierarchical self-attention",
        summary="On a tree of tokens, the matrix closest to softmax that is constant on siblings.",
        papers=(HSA,),
        sheet="hsa",
        capabilities=Capabilities(
            decode=Support(True, "with ties='columns', a causal extension; the paper has encoders"),
            causal_outputs=TIED_ROWS,
            causal_routing=TIED_ROWS,
        ),
        jobs=("Attention", "use", "train"),
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
