"""Attentions and mixers of another formula than the softmax."""

from __future__ import annotations

from foveate.catalog.row import Capabilities, Paper, Row, Support

HSA = Paper(
    "Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale Problems",
    "Amizadeh et al., 2025",
    "2509.15448",
)

TIED_ROWS = Support(False, "rows of a group share its mean query; causal is ties='columns'")

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
)
