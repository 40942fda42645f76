"""Layouts of tokens in clusters: within each cluster, and to the other clusters' summaries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.ops import Layout
from foveate.ops.layout import bits as bitset
from foveate.ops.layout.core import KEY_RANGE

if TYPE_CHECKING:
    from foveate.methods.combiner.learnable import Groups

TILE, LIST = 64, 32


def cluster_layout(groups: Groups, low: Tensor, high: Tensor, *, queries: bool) -> Layout:
    """Row p, in order of clusters, sees the keys of places low ... high - 1.

    Args:
        groups: whose order the keys are taken in.
        low: (B, Hkv, L), rising with the place.
        high: (B, Hkv, L), likewise.
        queries: whether queries are to be taken in that order as well, or stand in it already.
    """
    batch, heads, length = low.shape
    tiles = -(-length // TILE)
    first = low[..., ::TILE] // TILE
    ends = torch.arange(TILE - 1, tiles * TILE, TILE, device=low.device).clamp_max(length - 1)
    last = (high[..., ends] - 1) // TILE
    counts = (last - first + 1).flatten()
    stops = counts.cumsum(0)
    within = torch.arange(int(stops[-1]), device=low.device)
    entry = torch.repeat_interleave(torch.arange(len(counts), device=low.device), counts)
    cols = first.flatten()[entry] + within - (stops - counts)[entry]
    ends_by = stops.view(batch, heads, tiles)
    starts = ends_by[..., :1] - counts.view(batch, heads, tiles)[..., :1]
    order = groups.order.int()
    return Layout(
        q_len=length,
        kv_len=length,
        q_tile=TILE,
        kv_tile=TILE,
        ptr=torch.cat((starts, ends_by), -1),
        cols=cols.int(),
        kinds=torch.full_like(cols, KEY_RANGE).int(),
        bits=torch.zeros(0, TILE, TILE // 8, dtype=torch.uint8, device=low.device),
        q_index=order if queries else None,
        kv_index=order,
        key_range=torch.stack((low, high), -1).int().contiguous(),
    )


def last_members(ids: Tensor, clusters: int) -> Tensor:
    """(B, Hkv, T, C): of each cluster the last token before each tile of queries, -1 is none."""
    batch, heads, length = ids.shape
    tiles = -(-length // TILE)
    at = torch.arange(length, device=ids.device)
    cell = (at // TILE) * clusters + ids
    last = torch.full((batch, heads, tiles * clusters), -1, device=ids.device)
    last = last.scatter_reduce(2, cell, at.expand_as(ids), "amax")
    upto = last.view(batch, heads, tiles, clusters).cummax(2).values
    return F.pad(upto[:, :, :-1], (0, 0, 1, 0), value=-1)


def summary_layout(groups: Groups, clusters: int) -> Layout:
    """Query i sees of each cluster but its own the last token before it, by position."""
    ids, device = groups.ids, groups.ids.device
    batch, heads, length = ids.shape
    tiles = -(-length // TILE)
    after = F.pad(groups.order[..., 1:], (0, 1), value=length)
    at = torch.arange(length, device=device)
    ends = at + 1 == groups.high  # the cluster's last place has none after it
    after = after.masked_fill(ends, length)
    follows = torch.empty_like(after).scatter_(2, groups.order, after)  # by position

    spare = tiles * TILE - length
    rows = torch.arange(tiles * TILE, device=device).view(tiles, TILE)
    row_ids = F.pad(ids, (0, spare), value=-1).view(batch, heads, tiles, TILE)
    own = _cells(rows, follows, row_ids, spare)
    far = last_members(ids, clusters)
    width = -(-clusters // LIST) * LIST
    lists = F.pad(far, (0, width - clusters), value=-1)
    real = lists >= 0
    key = lists.clamp_min(0)
    flat = key.flatten(2)
    until = follows.gather(2, flat).view_as(key)
    theirs = ids.gather(2, flat).view_as(key)
    seen = (rows[:, None, :] < until[..., None]) & real[..., None]
    seen &= row_ids[..., None, :] != theirs[..., None]
    seen = seen.unflatten(3, (-1, LIST))  # (B, H, T, lists, keys, rows)

    some = real.unflatten(3, (-1, LIST)).any(-1)
    first = -(-length // LIST)
    own_cols = torch.arange(tiles * (TILE // LIST), device=device).view(tiles, -1)
    there = torch.cat(((own_cols < first).expand(batch, heads, -1, -1), some), 3)
    numbers = first + torch.arange(some.numel(), device=device).view_as(some)
    cols = torch.cat((own_cols.expand(batch, heads, -1, -1), numbers), 3)[there]
    bits = bitset.pack(torch.cat((own, seen), 3)[there])
    ends_by = there.sum(3).flatten().cumsum(0).view(batch, heads, tiles)
    starts = ends_by[..., :1] - there.sum(3)[..., :1]
    return Layout(
        q_len=length,
        kv_len=length,
        q_tile=TILE,
        kv_tile=LIST,
        ptr=torch.cat((starts, ends_by), -1),
        cols=cols.int(),
        kinds=torch.arange(1, len(cols) + 1, device=device).int(),
        bits=bits,
        gathered=lists.reshape(-1, LIST).int(),
    )


def _cells(rows: Tensor, follows: Tensor, row_ids: Tensor, spare: int) -> Tensor:
    """What rows see of their own tile's tokens: (B, H, T, lists, LIST, TILE)."""
    batch, heads, tiles, _ = row_ids.shape
    until = F.pad(follows, (0, spare), value=0).view(batch, heads, tiles, TILE)
    seen = (rows[:, :, None] <= rows[:, None, :]) & (rows[:, None, :] < until[..., None])
    seen = seen & (row_ids[..., None] != row_ids[..., None, :])
    return seen.unflatten(3, (-1, LIST))
