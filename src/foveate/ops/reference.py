"""The definition of right: softmax attention in a few lines of plain torch, any device and dtype.

s_ij = softcap(scale * q_i . k_j) + bias_ij,   out_i = sum_j exp(s_ij - lse_i) v_j,
lse_i = log sum_j exp(s_ij),   over the pairs that may attend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.types import AttentionOutput


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> AttentionOutput:
    """Attention with the whole score matrix, in fp32 at least; autograd differentiates it.

    Args:
        query: (B, Hq, Lq, D).
        key: (B, Hkv, Lkv, D), Hq a multiple of Hkv.
        value: (B, Hkv, Lkv, Dv).
        allowed: bool, broadcastable to (B, Hq, Lq, Lkv), True = attend; None is everything.
        scale: factor on the scores.
        softcap: c in c * tanh(s / c), before bias and mask.
        bias: added to the scores, broadcastable to (B, Hq, Lq, Lkv).
        dropout: probability of dropping a weight; the lse doesn't see it.
    """
    work = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    k = key.to(work).repeat_interleave(group, dim=1)
    v = value.to(work).repeat_interleave(group, dim=1)
    scores = query.to(work) @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(work)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    lse = _logsumexp(scores)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return AttentionOutput((weights @ v).to(query.dtype), lse)


def _logsumexp(scores: Tensor) -> Tensor:
    """Log sum exp over keys, -inf with a zero gradient for a row that has none."""
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -torch.inf)
    empty = (scores == -torch.inf).all(-1)
    safe = scores.masked_fill(empty[..., None], 0.0)
    return torch.logsumexp(safe, -1).masked_fill(empty, -torch.inf)
