"""Attentions and mixers of another formula than the softmax."""

from __future__ import annotations

from foveate.catalog.row import BUILDERS, Capabilities, Paper, Row, Support

DUVVURI = Paper(
    "LUCID: Attention with Preconditioned Representations", "Duvvuri et al., 2026", "2602.10410"
)

ALMAN_SONG = Paper(
    "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker "
    "Computation",
    "Alman and Song, 2024",
    "2310.04064",
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
    Row(
        key="tensor-attention",
        kind="attention",
        path="foveate.methods.tensor_attention.TensorAttention",
        title="Tensor attention",
        summary="Each query attends to pairs of tokens; exact, or near-linear where logits are "
        "small.",
        papers=(ALMAN_SONG,),
        sheet="tensor-attention",
        capabilities=Capabilities(
            causal_routing=Support(
                True,
                "the approximation's degree depends on the largest entries of all tokens, "
                "unless a radius is given",
            ),
        ),
        jobs=BUILDERS,
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
