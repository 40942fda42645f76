"""Attention weights after the fact, from the lse: chosen rows, sums of them, other values.

P_ij = exp(s_ij - lse_i). Everything here goes over blocks of rows, so that no Lq x Lkv matrix is
held, and everything is differentiable by torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from foveate.ops.bias import RelativeBias, spread_bias
from foveate.ops.check import check_bias
from foveate.ops.errors import InputError
from foveate.ops.masks import Mask

_ROWS = 256


def probs(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    rows: Tensor | None = None,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | RelativeBias | None = None,
) -> Tensor:
    """Attention weights of chosen queries: (B, Hq, n, Lkv) in fp32.

    Args:
        query: (B, Hq, Lq, D).
        key: (B, Hkv, Lkv, D).
        lse: (B, Hq, Lq), as `attention` returned it for the same mask.
        rows: (n,) indices of queries; None is all.
        mask: the mask of that call.
        scale: as in that call; None is D ** -0.5.
        softcap: as in that call.
        bias: as in that call.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    if lse.shape != query.shape[:3]:
        raise InputError(f"lse must be {tuple(query.shape[:3])}, got {tuple(lse.shape)}.")
    if rows is None:
        rows = torch.arange(q_len, device=query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    work = lse.dtype
    group = query.shape[1] // key.shape[1]
    q = query[:, :, rows].to(work).unflatten(1, (key.shape[1], group))
    scores = (q @ key.to(work)[:, :, None].mT).flatten(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        part, first = check_bias(bias, query, key)
        if first is not None:
            part = spread_bias(part, first, q_len, kv_len, rows)
        elif part.shape[2] > 1:
            part = part[:, :, rows]
        scores = scores + part.to(work)
    own = lse[:, :, rows]
    blind = own == -torch.inf
    # Hidden scores go before the exponential: above the lse they could overflow.
    hidden = blind[..., None]
    if mask is not None:
        hidden = hidden | ~_allowed(mask, query, kv_len, rows)
    scores = scores.masked_fill(hidden, -torch.inf)
    return torch.exp(scores - own.masked_fill(blind, 0.0)[..., None])


def _allowed(mask: Mask, query: Tensor, kv_len: int, rows: Tensor) -> Tensor:
    """The mask's rows for some queries: bool (1 or B, 1 or Hq, n, Lkv)."""
    q_len = query.shape[2]
    at = rows + (kv_len - q_len)
    allowed = mask.dense(len(rows), kv_len, q_positions=at, device=query.device)
    if allowed.shape[1] not in (1, query.shape[1]):
        allowed = allowed.repeat_interleave(query.shape[1] // allowed.shape[1], 1)
    return allowed


def _blocks(
    query: Tensor, key: Tensor, lse: Tensor, mask: Mask | None, options: dict[str, Any]
) -> Iterator:
    for rows in torch.arange(query.shape[2], device=query.device).split(_ROWS):
        yield rows, probs(query, key, lse, rows, mask, **options)


def column_sums(
    query: Tensor, key: Tensor, lse: Tensor, mask: Mask | None = None, **options: Any
) -> Tensor:
    """Weight that each key receives from all queries: (B, Hq, Lkv)."""
    return sum(p.sum(2) for _, p in _blocks(query, key, lse, mask, options))


def diagonal_sums(
    query: Tensor, key: Tensor, lse: Tensor, mask: Mask | None = None, **options: Any
) -> Tensor:
    """Weight at each distance: (B, Hq, Lkv), entry t sums P_ij over i - j = t >= 0.

    Positions are aligned at the end: query i stands at Lkv - Lq + i.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    sums = lse.new_zeros(*query.shape[:2], kv_len + 1)
    keys = torch.arange(kv_len, device=query.device)
    for rows, p in _blocks(query, key, lse, mask, options):
        distance = (rows + kv_len - q_len)[:, None] - keys
        distance = distance.where(distance >= 0, kv_len).reshape(-1)
        sums = sums.index_add(2, distance, p.flatten(2))
    return sums[..., :kv_len]


def block_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    tile: int,
    mask: Mask | None = None,
    **options: Any,
) -> Tensor:
    """Weight in each tile: (B, Hq, ceil(Lq / tile), ceil(Lkv / tile))."""
    q_len, kv_len = query.shape[2], key.shape[2]
    sums = lse.new_zeros(*query.shape[:2], -(-q_len // tile), -(-kv_len // tile))
    for rows, p in _blocks(query, key, lse, mask, options):
        p = torch.nn.functional.pad(p, (0, -kv_len % tile)).unflatten(-1, (-1, tile)).sum(-1)
        sums = sums.index_add(2, rows // tile, p)
    return sums


def apply_probs(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    values: Tensor,
    mask: Mask | None = None,
    **options: Any,
) -> Tensor:
    """The same weights on other values: values (B, Hkv, Lkv, C) to (B, Hq, Lq, C)."""
    group = query.shape[1] // values.shape[1]
    parts = []
    for _, p in _blocks(query, key, lse, mask, options):
        v = values.to(p.dtype)[:, :, None]
        parts.append((p.unflatten(1, (values.shape[1], group)) @ v).flatten(1, 2))
    return torch.cat(parts, 2).to(values.dtype)
