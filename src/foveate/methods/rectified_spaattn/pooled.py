"""The pooled picture of full attention: which blocks are computed, which are made up for, and how.

N blocks of visual tokens, n_m tokens in each (B, but for a short last one), T text keys as they
are; q_n, k_m block means, Kt text keys, s the scale:

    p      = softmax(s [q_n . k_m, q_n . Kt_j])                      over N + T entries
    P[m]   = n_m p[m] / Z,  P[text] = sum_j p_text[j] / Z,  Z = sum_m n_m p[m] + sum_j p_text[j]

which is a softmax with log n_m added to the visual logits (IPAR: text isn't pooled, so each of its
columns stands for one token). Then row by row

    M  = the count largest of P's N + 1 entries, count = max(#{cumsum <= p_thr} + 1, top_k);
         neighbours and text besides
    C  = not M and |q_n . k_m| > |dq_n . k_m| + |q_n . dk_m|         (GAPR; d: mean |token - mean|)
    R  = sum of P over what isn't in C

Source: Liu et al. 2025, arXiv 2511.19835; BienLuky/Rectified-SpaAttn, rectified_*_attn.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.parts.block_rows import Blocks, scores_of


class Pooled(NamedTuple):
    """map (B, Hq, N, N + 1) is P, text last, with gradients; raw (B, Hq, N, N) q_n . k_m.

    q (B, Hq, N, D), k (B, Hkv, N, D): block means.
    """

    map: Tensor
    raw: Tensor
    q: Tensor
    k: Tensor


def pooled_map(
    q: Tensor, k: Tensor, blocks: Blocks, text: Tensor, scale: float, ipar: bool = True
) -> Pooled:
    """P of a call.

    Args:
        q: (B, Hq, L, D).
        k: (B, Hkv, L, D).
        blocks: of visual tokens.
        text: (B', T) index of text keys, -1 is none.
        scale: of the scores.
        ipar: False takes p as it is, each pooled column for one token.
    """
    mean_q, mean_k = blocks.means(q), blocks.means(k)
    raw = scores_of(mean_q, mean_k)
    sizes = blocks.sizes[:, None, None].to(raw.dtype)
    more = sizes.log() if ipar else torch.where(sizes > 0, 0.0, -torch.inf)
    logits = scale * raw + more
    if text.shape[1]:
        index = text.expand(len(k), -1)
        at = index.clamp_min(0)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        keys = torch.where((index >= 0)[:, None, :, None], k.gather(2, at), 0.0)
        beside = scale * scores_of(mean_q, keys.to(mean_k.dtype))
        logits = torch.cat((logits, beside.masked_fill((index < 0)[:, None, None], -torch.inf)), -1)
    p = torch.softmax(logits, -1)
    count = raw.shape[-1]
    # A sequence of padding alone has no numbers.
    p = torch.where(p.isfinite(), p, 0.0)
    return Pooled(
        torch.cat((p[..., :count], p[..., count:].sum(-1, keepdim=True)), -1), raw, mean_q, mean_k
    )


def best_blocks(p: Tensor, top_k: int | Tensor, p_thr: float) -> Tensor:
    """M, the most attended entries of each row: bool, as P (..., N + 1), top_k at least."""
    if p_thr >= 1:
        return torch.ones_like(p, dtype=torch.bool)
    values, order = p.sort(dim=-1, descending=True, stable=True)
    count = ((values.cumsum(-1) <= p_thr).sum(-1, keepdim=True) + 1).clamp_min(top_k)
    first = torch.arange(p.shape[-1], device=p.device) < count
    return torch.zeros_like(first).scatter_(-1, order, first)


def worth_it(pooled: Pooled, q: Tensor, k: Tensor, blocks: Blocks) -> Tensor:
    """Blocks whose pooled score is larger than what pooling may be off by: bool (B, Hq, N, N)."""
    away_q, away_k = spread(q, pooled.q, blocks), spread(k, pooled.k, blocks)
    error = scores_of(away_q, pooled.k).abs() + scores_of(pooled.q, away_k).abs()
    return pooled.raw.abs() > error


def spread(x: Tensor, means: Tensor, blocks: Blocks) -> Tensor:
    """Mean over each block's tokens of |x - mean|, number by number: (B, H, N, D)."""
    owner, _ = blocks.owner(x.shape[2])
    at = owner.expand(len(x), -1).clamp_min(0)[:, None, :, None]
    own = means.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3]))
    return blocks.means((x.to(means.dtype) - own).abs())


def keep_of(drop: float, blocks: int) -> int:
    """top_k = floor((1 - drop) N), of numbers as they are written."""
    return math.floor((1 - drop) * blocks + 1e-9)
