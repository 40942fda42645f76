"""From columns and offsets to what a kernel visits: runs of keys and single keys per row block.

For rows [p, p + 64) walk the offsets t < p + 64 from the largest. Each gives the run of 64 keys
that begins at max(p - t, 0). A run that begins within or right behind the last one extends it by
64, one further on opens a new one; columns outside all runs are listed singly (MInference,
arXiv 2407.02490, algorithm 4).

In terms of u = p - (first key of a run), the run after u begins at min(u - 64, largest t < u): a
function that no row block changes. So it is one table per head, and all row blocks walk it at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.parts.listing import Runs, Singles

_FAR = 1 << 40


def kernel_index(
    columns: Tensor, offsets: Tensor, shift: Tensor, first: Tensor, q_len: int, tile: int
) -> tuple[Runs, Singles]:
    """What each block of `tile` rows visits to cover the columns and offsets.

    Args:
        columns: (B, H, Lkv) bool.
        offsets: (B, H, Lkv) bool.
        shift: (B or 1,) index of the first query among the keys.
        first: (B or 1,) index of the first real key, where keys begin.
        q_len: number of queries.
        tile: rows of a block and keys of a run.

    Returns:
        Runs of `tile` keys that don't overlap, and single keys that lie in none of them. Runs may
        reach beyond a row's own key and beyond the last one; the mask cuts them.
    """
    batch, heads, kv_len = columns.shape
    starts = _walk(offsets, shift, first, q_len, tile)
    group = batch * heads
    rows = starts.shape[1] // group
    flat = starts.t()  # (group * rows, steps), ascending, then -1
    cell, step = ((flat >= 0) & (flat < kv_len)).nonzero(as_tuple=True)
    begin = flat[cell, step]
    runs = Runs(cell // rows, cell % rows, begin)

    # A run lies in the bucket of its first key, and there is at most one in each.
    spare = kv_len // tile + 3
    bucket = torch.full((group * rows, spare), -_FAR, device=columns.device)
    bucket[cell, begin // tile + 1] = begin
    counts = columns.flatten(0, 1).sum(1)
    width = int(counts.max()) if group else 0
    owner, key = columns.flatten(0, 1).nonzero(as_tuple=True)
    place = torch.arange(len(key), device=key.device) - (counts.cumsum(0) - counts)[owner]
    keys = key.new_full((group, width), _FAR)
    keys[owner, place] = key
    end = torch.arange(0, q_len, tile, device=keys.device) + tile + shift[:, None]
    end = end.expand(batch, rows).repeat_interleave(heads, 0)
    at = (keys.clamp_max(kv_len) // tile)[:, None].expand(-1, rows, -1)
    bucket = bucket.view(group, rows, spare)
    wide = keys[:, None]
    into = wide - bucket.gather(2, at + 1)
    past = wide - bucket.gather(2, at)
    alone = (wide < end[..., None]) & ((into < 0) | (into >= tile)) & (past >= tile)
    g, row, which = alone.nonzero(as_tuple=True)
    return runs, Singles(g, row, keys[g, which])


def _walk(offsets: Tensor, shift: Tensor, first: Tensor, q_len: int, tile: int) -> Tensor:
    """First keys of the runs: (steps, B * H * rows) int64, ascending along steps, then -1."""
    batch, heads, kv_len = offsets.shape
    device = offsets.device
    places = torch.arange(kv_len, device=device)
    # below[t]: the largest chosen offset <= t, or -1.
    below = torch.where(offsets, places, -1).flatten(0, 1).cummax(1).values
    # Places u = -tile ... kv_len - 1 of the walk stand at u + tile; -tile itself is the end.
    after = below.new_full((batch * heads, kv_len + tile), -tile)
    before = below[:, : kv_len - 1]
    after[:, tile + 1 :] = torch.where(before >= 0, torch.minimum(places[1:] - tile, before), -tile)
    base = torch.arange(batch * heads, device=device)[:, None] * (kv_len + tile) + tile
    after = (after + base).reshape(-1)

    own = torch.arange(0, q_len, tile, device=device) + shift[:, None]  # the first row's own key
    own = own.expand(batch, -1)
    rows = own.shape[1]
    from_first = (own - first[:, None]).repeat_interleave(heads, 0)
    top = from_first + tile - 1
    largest = below.gather(1, top.clamp(0, kv_len - 1))
    u = torch.minimum(largest, from_first)
    u = torch.where((largest >= 0) & (top >= 0), u, -tile)
    at = (u + base).reshape(-1)
    steps = max(1, min(int(own.max()) + tile, kv_len + tile) // tile + 2) if rows else 1
    walked = torch.empty(steps, at.numel(), dtype=torch.int64, device=device)
    for step in range(steps):
        walked[step] = at
        at = after[at]
    walked = walked - base.expand(-1, rows).reshape(-1)
    begin = own.repeat_interleave(heads, 0).reshape(-1) - walked
    return begin.masked_fill(walked == -tile, -1)
