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

    end = torch.arange(0, q_len, tile, device=columns.device) + tile + shift[:, None]
    end = end.expand(batch, rows).repeat_interleave(heads, 0)
    bucket = torch.full((group * rows, kv_len // tile + 2), _FAR, device=columns.device)
    bucket[cell, begin // tile + 1] = begin
    return runs, _singles(columns.flatten(0, 1), bucket.view(group, rows, -1), end, tile)


def _singles(columns: Tensor, bucket: Tensor, end: Tensor, tile: int) -> Singles:
    """Columns (G, Lkv) before `end` (G, rows) that no run holds.

    A run stands in the bucket of its first key, one further on than key // tile; each bucket has
    one at most. So what is free in a bucket is one interval, from where the last bucket's run ends
    to where its own begins.
    """
    kv_len = columns.shape[1]
    own, last = bucket[..., 1:], bucket[..., :-1]
    low = torch.arange(own.shape[-1], device=bucket.device) * tile
    high = (low + tile).clamp_max(kv_len)
    start = torch.maximum(low, torch.where(last < _FAR, last + tile, 0)).clamp_max(kv_len)
    stop = torch.minimum(torch.minimum(own, high), end[..., None])
    before = torch.nn.functional.pad(columns.cumsum(1), (1, 0))
    first = before.gather(1, start.flatten(1)).view_as(start)
    counts = before.gather(1, stop.clamp_min(0).flatten(1)).view_as(start) - first
    counts = counts.masked_fill(stop <= start, 0)
    g, row, at = counts.nonzero(as_tuple=True)
    counts = counts[g, row, at]
    total = int(counts.sum())
    cell = torch.repeat_interleave(torch.arange(len(g), device=g.device), counts, output_size=total)
    base = before[:, -1].cumsum(0) - before[:, -1] if len(before) else before[:, -1]
    first = first[g, row, at] + base[g] - (counts.cumsum(0) - counts)
    keys = columns.nonzero()[:, 1]
    return Singles(g[cell], row[cell], keys[first[cell] + torch.arange(total, device=g.device)])


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
