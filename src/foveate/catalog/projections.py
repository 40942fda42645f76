"""How heads are made, and what of them is cached."""

from __future__ import annotations

from foveate.catalog.row import BUILDERS, VASWANI, Capabilities, Paper, Row, Support

SHAZEER = Paper(
    "Fast Transformer Decoding: One Write-Head is All You Need", "Shazeer, 2019", "1911.02150"
)

AINSLIE = Paper(
    "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
    "Ainslie et al., 2023",
    "2305.13245",
)
STEP3 = Paper(
    "Step-3 is Large yet Affordable: Model-system Co-design for Cost-effective Decoding",
    "StepFun, 2025",
    "2507.19427",
)

MFA = Paper("Multi-matrix Factorization Attention", "Hu et al., 2024", "2412.19255")

SQA = Paper(
    "Sparse Query Attention (SQA): A Computationally Efficient Attention Mechanism with Query "
    "Heads Reduction",
    "Filipek, 2025",
    "2510.01817",
)
DEEPSEEK_V2 = Paper(
    "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
    "DeepSeek-AI, 2024",
    "2405.04434",
)

TPLA = Paper(
    "TPLA: Tensor Parallel Latent Attention for Efficient Disaggregated Prefill & Decode Inference",
    "Tang et al., 2025",
    "2508.15881",
)

GLA = Paper("Hardware-Efficient Attention for Fast Decoding", "Zadouri et al., 2025", "2505.21487")

MOH = Paper(
    "MoH: Multi-Head Attention as Mixture-of-Head Attention", "Jin et al., 2024", "2410.11842"
)

ROWS: tuple[Row, ...] = (
    Row(
        key="mha",
        kind="projection",
        path="foveate.methods.gqa.MHA",
        title="Multi-head",
        summary="A key and a value head for every query head.",
        papers=(VASWANI,),
        miniature="",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="gqa",
        kind="projection",
        path="foveate.methods.gqa.GQA",
        title="Grouped-query",
        summary="Groups of query heads share a key and a value head.",
        papers=(AINSLIE,),
        miniature="",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="mqa",
        kind="projection",
        path="foveate.methods.gqa.MQA",
        title="Multi-query",
        summary="One key and one value head under all query heads.",
        papers=(SHAZEER,),
        miniature="",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="mfa",
        kind="projection",
        path="foveate.methods.step3.MFA",
        title="Multi-matrix factorization (Step-3)",
        summary="Many wide query heads of low rank on one wide key and value head.",
        papers=(MFA, STEP3),
        miniature="step3",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="mfa-kr",
        kind="projection",
        path="foveate.methods.step3.MFAKR",
        title="MFA with key reuse",
        summary="MFA whose values are made from its keys, so that only keys are cached.",
        papers=(MFA, STEP3),
        miniature="step3",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="mla",
        kind="projection",
        path="foveate.methods.tpla.MLA",
        title="Multi-head latent (DeepSeek)",
        summary="Keys and values of all heads from one small latent, never made in decoding.",
        papers=(DEEPSEEK_V2, TPLA),
        miniature="tpla",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="tpla",
        kind="projection",
        path="foveate.methods.tpla.TPLA",
        title="Tensor-parallel latent",
        summary="MLA with its latent split over devices, each with a softmax of its own; or GLA.",
        papers=(TPLA, GLA),
        miniature="tpla",
        capabilities=Capabilities(
            decode=Support(True, "approximates its exact prefill, as in the paper, if pd_sep")
        ),
        jobs=BUILDERS,
    ),
    Row(
        key="sqa",
        kind="projection",
        path="foveate.methods.sqa.SQA",
        title="Sparse query attention",
        summary="Fewer query heads of the same width, for fewer FLOPs on whole sequences.",
        papers=(SQA,),
        miniature="sqa",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
    Row(
        key="moh",
        kind="projection",
        path="foveate.methods.moh.MoH",
        title="Mixture of heads",
        summary="Each token chooses which heads count for it; the others aren't computed.",
        papers=(MOH,),
        miniature="moh",
        capabilities=Capabilities(),
        jobs=BUILDERS,
    ),
)
