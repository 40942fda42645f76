"""Attentions for models as they are: exact, static, and chosen by content."""

from __future__ import annotations

from foveate.catalog.row import VASWANI, Capabilities, Paper, Row, Support

STREAMING = Paper(
    "Efficient Streaming Language Models with Attention Sinks", "Xiao et al., 2023", "2309.17453"
)

SINKS = Paper(
    "Attention Sink in Transformers: A Survey on Utilization, Interpretation, and Mitigation",
    "Su et al., 2026",
    "2604.10098",
)

MINFERENCE = Paper(
    "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
    "Jiang et al., 2024",
    "2407.02490",
)

MMINFERENCE = Paper(
    "MMInference: Accelerating Pre-filling for Long-Context VLMs via Modality-Aware Permutation "
    "Sparse Attention",
    "Li et al., 2025",
    "2504.16083",
)

HYPER = Paper(
    "HyperAttention: Long-context Attention in Near-Linear Time", "Han et al., 2023", "2310.05869"
)

NAT = Paper("Neighborhood Attention Transformer", "Hassani et al., 2022", "2204.07143")

DINAT = Paper("Dilated Neighborhood Attention Transformer", "Hassani and Shi, 2022", "2209.15001")

FASTER_NA = Paper(
    "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock "
    "Level",
    "Hassani et al., 2024",
    "2403.04690",
)

GENERALIZED_NA = Paper(
    "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
    "Hassani et al., 2025",
    "2504.16922",
)

DHSA = Paper(
    "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
    "Xiong et al., 2025",
    "2510.24606",
)

FLUX = Paper(
    "Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference",
    "Qiu et al., 2026",
    "2604.07394",
)

GRIDS = ("Attention", "use", "bench", "cost")

FITTED = ("compare", "use", "fit")

DENSE_DECODE = Support(True, "dense over the whole cache, as in the paper")

CAUSAL_ONLY = Support(False, "defined for causal attention; use block-sparse")

LAST_QUERIES = Support(False, "the last queries choose the index for all rows")

SLASHES = Support(False, "a slash is a distance to an earlier key; use block-sparse")

SORTED_QUERIES = Support(False, "a query's block depends on the queries that are sorted with it")

PROMPT_END = Support(False, "the prompt's last queries choose the layer's form for all rows")

STREAMED = Support(False, "streaming is causal; use sink-window")

CAUSAL_CHUNKS = Support(False, "chunks are scored for causal models; use block-sparse")

LOOKS_AHEAD = Support(False, "block means and the boundary predictor look ahead")

POOLED_BLOCK = Support(False, "a block's mean query and key hold its later tokens")

ROWS: tuple[Row, ...] = (
    Row(
        key="full",
        kind="pattern",
        path="foveate.methods.full.Full",
        title="Full attention",
        summary="Every key that the mask allows; what the others are measured against.",
        papers=(VASWANI,),
        miniature="",
        capabilities=Capabilities(),
    ),
    Row(
        key="sink-window",
        kind="pattern",
        path="foveate.methods.attention_sink.SinkWindow",
        title="Sink + window (StreamingLLM)",
        summary="The first few tokens and a sliding window; as a mask, or with a bounded cache.",
        papers=(STREAMING, SINKS),
        miniature="attention-sink",
        capabilities=Capabilities(),
    ),
    Row(
        key="a-shape",
        kind="pattern",
        path="foveate.methods.mminference.AShape",
        title="A-shape (MInference)",
        summary="A wide sink and a local band, the static head pattern of MInference.",
        papers=(MINFERENCE, MMINFERENCE),
        miniature="mminference",
        capabilities=Capabilities(decode=DENSE_DECODE),
    ),
    Row(
        key="vertical-slash",
        kind="pattern",
        path="foveate.methods.mminference.VerticalSlash",
        title="Vertical-slash (MInference)",
        summary="Key columns and diagonals, chosen from the attention of the last 64 queries.",
        papers=(MINFERENCE, MMINFERENCE),
        miniature="mminference",
        capabilities=Capabilities(
            decode=DENSE_DECODE, bidirectional=SLASHES, causal_routing=LAST_QUERIES
        ),
    ),
    Row(
        key="block-sparse",
        kind="pattern",
        path="foveate.methods.mminference.BlockSparse",
        title="Block-sparse (MInference)",
        summary="Per block of queries the key blocks whose pooled scores are highest.",
        papers=(MINFERENCE, MMINFERENCE),
        miniature="mminference",
        capabilities=Capabilities(decode=DENSE_DECODE, causal_routing=POOLED_BLOCK),
    ),
    Row(
        key="fna",
        kind="pattern",
        path="foveate.methods.fna.FNA",
        title="Neighborhood attention (fused)",
        summary="On a grid of tokens in one to three axes, the window of the nearest ones.",
        papers=(FASTER_NA, NAT, DINAT),
        miniature="fna",
        capabilities=Capabilities(),
        jobs=GRIDS,
    ),
    Row(
        key="gna",
        kind="pattern",
        path="foveate.methods.gna.GNA",
        title="Generalized neighborhood attention",
        summary="Neighborhoods whose windows groups of queries share, so that whole tiles count.",
        papers=(GENERALIZED_NA, FASTER_NA),
        miniature="gna",
        capabilities=Capabilities(
            decode=Support(True, "with a stride, the last group's window depends on the length")
        ),
        jobs=GRIDS,
    ),
    Row(
        key="tri-shape",
        kind="pattern",
        path="foveate.methods.mminference.TriShape",
        title="Tri-shape (MInference)",
        summary="An A-shape whose last queries see everything; the papers' baseline.",
        papers=(MINFERENCE, MMINFERENCE),
        miniature="mminference",
        capabilities=Capabilities(decode=DENSE_DECODE, bidirectional=CAUSAL_ONLY),
    ),
    Row(
        key="grid",
        kind="pattern",
        path="foveate.methods.mminference.Grid",
        title="Grid (MMInference)",
        summary="Every stride-th column and row, the stride and phase found in the input.",
        papers=(MMINFERENCE,),
        miniature="mminference",
        capabilities=Capabilities(
            decode=DENSE_DECODE, bidirectional=CAUSAL_ONLY, causal_routing=LAST_QUERIES
        ),
    ),
    Row(
        key="q-boundary",
        kind="pattern",
        path="foveate.methods.mminference.QBoundary",
        title="Q-boundary (MMInference)",
        summary="Text and vision queries each run a pattern of their own, on all keys.",
        papers=(MMINFERENCE,),
        miniature="mminference",
        capabilities=Capabilities(
            decode=DENSE_DECODE, bidirectional=CAUSAL_ONLY, causal_routing=LAST_QUERIES
        ),
    ),
    Row(
        key="2d-boundary",
        kind="pattern",
        path="foveate.methods.mminference.TwoDBoundary",
        title="2D-boundary (MMInference)",
        summary="Each pair of query and key modality runs its own pattern, merged by lse.",
        papers=(MMINFERENCE,),
        miniature="mminference",
        capabilities=Capabilities(
            decode=DENSE_DECODE, bidirectional=CAUSAL_ONLY, causal_routing=LAST_QUERIES
        ),
    ),
    Row(
        key="mminference",
        kind="attention",
        path="foveate.methods.mminference.MMInference",
        title="MMInference's search",
        summary="Each head runs the pattern and budget that a search on the model found for it.",
        papers=(MINFERENCE, MMINFERENCE),
        miniature="mminference",
        capabilities=Capabilities(
            decode=DENSE_DECODE, bidirectional=CAUSAL_ONLY, causal_routing=LAST_QUERIES
        ),
        jobs=FITTED,
    ),
    Row(
        key="hyperattention",
        kind="attention",
        path="foveate.methods.hyperattention.HyperAttention",
        title="HyperAttention",
        summary="Sorted diagonal blocks exactly, a few weighted sampled keys for the rest.",
        papers=(HYPER,),
        miniature="hyperattention",
        capabilities=Capabilities(
            decode=Support(True, "dense over the whole cache"), causal_routing=SORTED_QUERIES
        ),
    ),
    Row(
        key="dhsa",
        kind="pattern",
        path="foveate.methods.dhsa.DHSA",
        title="Dynamic hierarchical sparse (DHSA)",
        summary="A learnt predictor cuts chunks of unequal length; queries keep the best ones.",
        papers=(DHSA,),
        miniature="dhsa",
        capabilities=Capabilities(bidirectional=CAUSAL_CHUNKS, causal_routing=LOOKS_AHEAD),
        jobs=FITTED,
    ),
    Row(
        key="flux",
        kind="pattern",
        path="foveate.methods.flux.Flux",
        title="Flux",
        summary="A learnt router gives each layer full or sparse attention, once for each prompt.",
        papers=(FLUX,),
        miniature="flux",
        capabilities=Capabilities(bidirectional=STREAMED, causal_routing=PROMPT_END),
        jobs=FITTED,
    ),
)
