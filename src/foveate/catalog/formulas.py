"""Attentions and mixers of another formula than the softmax."""

from __future__ import annotations

from foveate.catalog.row import BUILDERS, Capabilities, Paper, Row, Support

HSA = Paper(
    "Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale Problems",
    "Amizadeh et al., 2025",
    "2509.15448",
)

TIED_ROWS = Support(False, "rows of a group share its mean query; causal is ties='columns'")

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

DUVVURI = Paper(
    "LUCID: Attention with Preconditioned Representations", "Duvvuri et al., 2026", "2602.10410"
)

ALMAN_SONG = Paper(
    "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker "
    "Computation",
    "Alman and Song, 2024",
    "2310.04064",
)

RCMHA = Paper(
    "RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
    "Sugiharto et al., 2023",
    "2308.03429",
)
PRIMER = Paper(
    "Primer: Searching for Efficient Transformers for Language Modeling",
    "So et al., 2021",
    "2109.08668",
)
TRANSFORMER_XL = Paper(
    "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
    "Dai et al., 2019",
    "1901.02860",
)

ROWS: tuple[Row, ...] = (
    Row(
        key="hsa",
        kind="attention",
        path="foveate.methods.hsa.HSA",
        title="Hierarchical self-attention",
        summary="On a tree of tokens, the matrix closest to softmax that is constant on siblings.",
        papers=(HSA,),
        miniature="hsa",
        capabilities=Capabilities(
            decode=Support(True, "with ties='columns', a causal extension; the paper has encoders"),
            causal_outputs=TIED_ROWS,
            causal_routing=TIED_ROWS,
        ),
        jobs=("Attention", "use", "train"),
    ),
    Row(
        key="flowformer",
        kind="attention",
        path="foveate.methods.flowformer.Flowformer",
        title="Flow-Attention",
        summary="Linear time; sources compete and sinks are allotted, as in a network of flows.",
        papers=(FLOW,),
        miniature="flowformer",
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
        miniature="gaam",
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
        miniature="grassmann",
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
        miniature="deconstructing",
        capabilities=Capabilities(gqa=NO_HEADS),
        jobs=MIXERS,
    ),
    Row(
        key="deconstructed-approximate",
        kind="attention",
        path="foveate.methods.deconstructing.Approximate",
        title="Taylor attention (Deconstructing)",
        summary="The softmax's second-order expansion, in linear time with running sums.",
        papers=(DECONSTRUCTING, BASED),
        miniature="deconstructing",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="deconstructed-nonapproximate",
        kind="attention",
        path="foveate.methods.deconstructing.NonApproximate",
        title="One score for each key (Deconstructing)",
        summary="A running softmax whose scores depend on the key's position alone.",
        papers=(DECONSTRUCTING,),
        miniature="deconstructing",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="static-emb-qk",
        kind="mixer",
        path="foveate.methods.deconstructing.StaticEmbQK",
        title="Queries and keys of the embeddings (Deconstructing)",
        summary="In every layer the token embeddings decide who attends to whom.",
        papers=(DECONSTRUCTING,),
        miniature="deconstructing",
        capabilities=Capabilities(),
        jobs=MIXERS,
    ),
    Row(
        key="rnd-emb-qk",
        kind="mixer",
        path="foveate.methods.deconstructing.RndEmbQK",
        title="Queries and keys of fixed noise (Deconstructing)",
        summary="Fixed random embeddings run through the blocks and decide who attends to whom.",
        papers=(DECONSTRUCTING,),
        miniature="deconstructing",
        capabilities=Capabilities(),
        jobs=MIXERS,
    ),
    Row(
        key="fixed-seq-qk",
        kind="mixer",
        path="foveate.methods.deconstructing.FixedSeqQK",
        title="Queries and keys of a fixed text (Deconstructing)",
        summary="One fixed sequence runs through the blocks and decides who attends to whom.",
        papers=(DECONSTRUCTING,),
        miniature="deconstructing",
        capabilities=Capabilities(),
        jobs=MIXERS,
    ),
    Row(
        key="lucid",
        kind="attention",
        path="foveate.methods.lucid.Lucid",
        title="LUCID",
        summary="Any attention over values from which similar earlier keys' part is erased first.",
        papers=(DUVVURI,),
        miniature="lucid",
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
        miniature="tensor-attention",
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
        key="rcmha",
        kind="attention",
        path="foveate.methods.rcmha.RCMHA",
        title="Relative convolutional attention",
        summary="A short convolution on queries, keys and values; scores by learnt distances; a "
        "memory of earlier segments.",
        papers=(RCMHA, PRIMER, TRANSFORMER_XL),
        miniature="rcmha",
        capabilities=Capabilities(
            decode=Support(
                True,
                "from keys, values and the convolution's last inputs; equal to the whole sequence "
                "unless segment_conv='reset' or a memory is set",
            ),
            bidirectional=Support(True, "scores do; the convolution looks back all the same"),
        ),
        jobs=BUILDERS,
    ),
)
