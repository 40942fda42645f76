"""Routers that share: a token's experts by a weighted average over related tokens.

    rbar(i) = sum_j S_ij r(u_j)          S by similarity, or the attention layer's weights

Nguyen, Tran, Khai Nguyen, Baraniuk 2025, arXiv 2505.00792, beside plain top-k and the baselines
that it compares with. What is averaged are probabilities; the experts run on the token's own u.
"""

from foveate.methods.attn_smoe.recipes import (
    AttentionAware,
    DropoutRouter,
    Similarity,
    StableMoE,
    TopK,
    XMoE,
)
from foveate.methods.attn_smoe.relations import AttentionRelation, SimilarityRelation
from foveate.methods.attn_smoe.scores import CosineScores, FrozenScores, StableScores

__all__ = [
    "AttentionAware",
    "AttentionRelation",
    "CosineScores",
    "DropoutRouter",
    "FrozenScores",
    "Similarity",
    "SimilarityRelation",
    "StableMoE",
    "StableScores",
    "TopK",
    "XMoE",
]
