"""How tokens choose the experts that run for them."""

from __future__ import annotations

from foveate.catalog.row import Capabilities, Paper, Row, Support

GRAPH = Paper(
    "Improving Routing in Sparse Mixture of Experts with Graph of Tokens",
    "Nguyen et al., 2025",
    "2505.00792",
)
SHAZEER = Paper(
    "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    "Shazeer et al., 2017",
    "1701.06538",
)
CHI = Paper(
    "On the Representation Collapse of Sparse Mixture of Experts", "Chi et al., 2022", "2204.09179"
)
CHEN = Paper(
    "Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable Transformers",
    "Chen et al., 2023",
    "2303.01610",
)
DAI = Paper(
    "StableMoE: Stable Routing Strategy for Mixture of Experts", "Dai et al., 2022", "2204.08396"
)

HEADS = Support(True, "has no heads of its own")
MODELS = ("FoveateConfig(router=...)", "train")

ROWS: tuple[Row, ...] = (
    Row(
        key="top-k",
        kind="router",
        path="foveate.methods.attn_smoe.TopK",
        title="Top-k routing",
        summary="Each token chooses its experts by itself, by a linear map.",
        papers=(SHAZEER,),
        miniature="attn-smoe",
        capabilities=Capabilities(gqa=HEADS),
        jobs=MODELS,
    ),
    Row(
        key="similarity-smoe",
        kind="router",
        path="foveate.methods.attn_smoe.Similarity",
        title="Similarity-aware routing",
        summary="A token's experts by an average over the tokens of its sequence that are alike.",
        papers=(GRAPH,),
        miniature="attn-smoe",
        capabilities=Capabilities(
            decode=Support(True, "keeps E + D numbers more of each token"), gqa=HEADS
        ),
        jobs=MODELS,
    ),
    Row(
        key="attention-smoe",
        kind="router",
        path="foveate.methods.attn_smoe.AttentionAware",
        title="Attention-aware routing",
        summary="A token's experts by an average over the tokens that its attention looked at.",
        papers=(GRAPH,),
        miniature="attn-smoe",
        capabilities=Capabilities(
            prefill=Support(
                True,
                "behind patterns such as full or sink-window; formulas, mixers and projections "
                "that choose heads are refused",
            ),
            decode=Support(True, "keeps E numbers more of each token"),
        ),
        jobs=MODELS,
    ),
    Row(
        key="xmoe",
        kind="router",
        path="foveate.methods.attn_smoe.XMoE",
        title="XMoE",
        summary="Scores by directions of the experts in a few dimensions.",
        papers=(CHI,),
        miniature="attn-smoe",
        capabilities=Capabilities(gqa=HEADS),
        jobs=MODELS,
    ),
    Row(
        key="smoe-dropout",
        kind="router",
        path="foveate.methods.attn_smoe.DropoutRouter",
        title="SMoE-Dropout",
        summary="A random router that isn't trained; more experts run as training goes on.",
        papers=(CHEN,),
        miniature="attn-smoe",
        capabilities=Capabilities(gqa=HEADS),
        jobs=MODELS,
    ),
    Row(
        key="stable-moe",
        kind="router",
        path="foveate.methods.attn_smoe.StableMoE",
        title="StableMoE",
        summary="Learns to choose experts by a token's id alone, and keeps to it from then on.",
        papers=(DAI,),
        miniature="attn-smoe",
        capabilities=Capabilities(gqa=HEADS),
        jobs=MODELS,
    ),
)
