"""Region-to-region routing: which regions of keys the queries of each region see.

    qr_r = mean of q over region r,  kr_r = mean of k,  A = qr kr^T,  I_r = the k best of A_r   (1)

All heads are one vector there, so that they share one table I. A is not differentiated unless the
routing is soft: then the keys and values of the t-th chosen region count times w_rt, with

    w_r = softmax over t of (C^-1/2 A_r,I(r,t)),

C the width of all heads together. Attention over what was chosen goes by row gathers of the core
op: a query tile lies within one region and lists single keys, so nothing of the size p^2 n^2, and
no copy of gathered keys and values, is made.

Source: Zhu et al. 2023, arXiv 2303.08810, equations 2 to 7; soft routing is in the released code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.methods.biformer.regions import Regions
from foveate.ops import AttentionOutput, Layout, attention, merge
from foveate.parts.precision import uncast
from foveate.parts.selection import topk_mask

_MOST = 64  # rows of a query tile


def affinity(query: Tensor, key: Tensor) -> Tensor:
    """A (B, p, p') of means qr (B, Hq, p, D) and kr (B, Hkv, p', D), in their dtype.

    With fewer key heads each counts for its group of query heads, as if it were repeated.
    """
    with uncast(query):  # means in fp32 are compared in fp32
        grouped = query.unflatten(1, (key.shape[1], -1)).sum(2)
        return grouped.transpose(1, 2).flatten(2) @ key.permute(0, 1, 3, 2).flatten(1, 2)


def route(scores: Tensor, k: int, allowed: Tensor | None = None) -> Tensor:
    """The k best regions of each: (B, p, min(k, p')) int64, best first, -1 where none is left.

    Of equal ones that with the lower number is taken first.

    Args:
        scores: A, (B, p, p').
        k: how many.
        allowed: bool, broadcastable to scores; None is all.
    """
    best = topk_mask(scores, k, allowed)
    lowest = torch.finfo(scores.dtype).min  # what is chosen stands before all that isn't
    ranks = torch.where(scores >= lowest, scores, lowest).masked_fill(~best, -torch.inf)
    order = ranks.argsort(dim=-1, descending=True, stable=True)
    order = order[..., : min(k, scores.shape[-1])]
    return order.where(best.gather(-1, order), -1)


def soft_weights(scores: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """W (B, p, k): softmax of scale A over the chosen regions; 0 where none is chosen."""
    none = chosen < 0
    logits = (scale * scores.gather(-1, chosen.clamp_min(0))).masked_fill(none, -torch.inf)
    return logits.masked_fill(none.all(-1, keepdim=True), 0.0).softmax(-1).masked_fill(none, 0.0)


def tile_of(rows: int, most: int = _MOST) -> int:
    """A multiple of 8 of at most `most` that cuts so many rows with the least waste."""
    tiles = -(-rows // most)
    return -(-rows // (8 * tiles)) * 8


def region_layout(chosen: Tensor, queries: Regions, keys: Regions) -> Layout:
    """The layout in which every query sees the tokens of its region's chosen regions.

    Args:
        chosen: (B or 1, p, k) regions of keys, -1 is none; none twice in a row.
        queries: p regions.
        keys: p' regions.
    """
    batch = max(len(chosen), len(queries.table), len(keys.table))
    p, k = chosen.shape[1:]
    rows = queries.padded(tile_of(queries.size))
    q_tile = tile_of(queries.size)
    kv_tile = tile_of(k * keys.size)
    table = keys.table.expand(batch, -1, -1)
    at = chosen.expand(batch, -1, -1).clamp_min(0).flatten(1)[..., None].expand(-1, -1, keys.size)
    listed = table.gather(1, at).unflatten(1, (p, k))
    listed = listed.masked_fill((chosen < 0)[..., None], -1).flatten(2)
    if not keys.whole or bool((chosen < 0).any()):  # keys first, so that whole tiles may go
        listed = listed.gather(2, (listed < 0).to(torch.uint8).argsort(dim=-1, stable=True))
    listed = torch.nn.functional.pad(listed, (0, -listed.shape[2] % kv_tile), value=-1)
    listed = listed.unflatten(2, (-1, kv_tile))  # (B, p, lists, kv_tile)
    real = (listed >= 0).any(-1)
    number = real.flatten().cumsum(0).view_as(real) - 1
    own = -(-keys.tokens // kv_tile)
    tiles = rows.shape[2] // q_tile
    visits = real[:, :, None].expand(-1, -1, tiles, -1)
    ends = visits.sum(-1).flatten().cumsum(0).view(batch, 1, p * tiles)
    starts = torch.cat((ends.new_zeros(1), ends[:-1, 0, -1]))[:, None, None]
    cols = (own + number)[:, :, None].expand_as(visits)[visits]
    return Layout(
        q_len=queries.tokens,
        kv_len=keys.tokens,
        q_tile=q_tile,
        kv_tile=kv_tile,
        ptr=torch.cat((starts, ends), -1),
        cols=cols.int(),
        kinds=torch.zeros_like(cols, dtype=torch.int32),
        bits=torch.zeros(0, kv_tile, q_tile // 8, dtype=torch.uint8, device=cols.device),
        gathered=listed[real].int(),
        q_index=rows.flatten(1)[:, None].int(),
    )


def soft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    weights: Tensor,
    regions: tuple[Regions, Regions],
    options: dict[str, Any],
) -> AttentionOutput:
    """Attention to the chosen regions' keys and values, those of the t-th times w_t.

    Part t sees one region; its scores are (w_t q) . k and its values w_t v, and parts are put
    together by their lse, since their keys are disjoint.

    Args:
        query: (B, Hq, N, D).
        key: (B, Hkv, N', D).
        value: (B, Hkv, N', Dv).
        chosen: (B, p, k).
        weights: (B, p, k), through which gradients pass.
        regions: of queries and of keys.
        options: of the core op.
    """
    queries, keys = regions
    of = queries.of.expand(len(weights), -1)
    parts = []
    for t in range(chosen.shape[2]):
        w = weights[..., t].gather(1, of)[:, None, :, None].to(query.dtype)
        layout = region_layout(chosen[..., t : t + 1], queries, keys)
        part = attention(query * w, key, value, layout=layout, **options)
        parts.append(AttentionOutput(part.out * w, part.lse))
    return merge(parts)


def with_rows(layout: Layout, queries: Regions, keys: Regions) -> Layout:
    """A layout over the padded tables of regions, as one over the tokens that stand there."""
    return replace(
        layout,
        q_len=queries.tokens,
        kv_len=keys.tokens,
        q_index=queries.padded(layout.q_tile).flatten(1)[:, None].int(),
        kv_index=keys.padded(layout.kv_tile).flatten(1)[:, None].int(),
        _counts=[],
    )
