"""Attentions that choose blocks of keys by their means: for long texts, and for videos."""

from __future__ import annotations

from foveate.catalog.row import Capabilities, Paper, Row, Support

MOBA = Paper(
    "MoBA: Mixture of Block Attention for Long-Context LLMs", "Lu et al., 2025", "2502.13189"
)

VMOBA = Paper(
    "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", "Wu et al., 2025", "2506.23858"
)

RECTIFIED = Paper(
    "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation",
    "Liu et al., 2025",
    "2511.19835",
)

VIDEO = ("Attention", "DiT", "bench", "use")

WHOLE_VIDEO = Support(False, "self attention over a whole video; nothing is decoded")

NOT_CAUSAL = Support(False, "defined without causality; use moba")

ROWS: tuple[Row, ...] = (
    Row(
        key="moba",
        kind="pattern",
        path="foveate.methods.moba.MoBA",
        title="Mixture of block attention (MoBA)",
        summary="Per query its own block and the earlier blocks whose mean keys score highest.",
        papers=(MOBA,),
        miniature="vmoba",
        capabilities=Capabilities(
            decode=Support(True, "dense over the whole cache, or by option the same rule"),
            bidirectional=Support(False, "defined for causal attention; use vmoba or block-sparse"),
        ),
        jobs=("compare", "use", "Attention", "train"),
    ),
    Row(
        key="vmoba",
        kind="attention",
        path="foveate.methods.vmoba.VMoBA",
        title="Video mixture of block attention (VMoBA)",
        summary="Blocks of frames, places and both by turns; pairs of a whole head compete.",
        papers=(VMOBA, MOBA),
        miniature="vmoba",
        capabilities=Capabilities(
            decode=WHOLE_VIDEO, causal_outputs=NOT_CAUSAL, causal_routing=NOT_CAUSAL
        ),
        jobs=VIDEO,
    ),
    Row(
        key="rectified-spaattn",
        kind="attention",
        path="foveate.methods.rectified_spaattn.RectifiedSpaAttn",
        title="Rectified SpaAttn",
        summary="Few key blocks, scaled to their share of the mass; pooled values for others.",
        papers=(RECTIFIED,),
        miniature="rectified-spaattn",
        capabilities=Capabilities(
            decode=WHOLE_VIDEO,
            backward=Support(True, "what is chosen is constant; the factors have gradients"),
            causal_outputs=NOT_CAUSAL,
            causal_routing=NOT_CAUSAL,
        ),
        jobs=VIDEO,
    ),
)
