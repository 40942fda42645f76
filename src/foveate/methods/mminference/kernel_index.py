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
_BUDGET = 1 << 21  # row blocks x buckets of heads that are walked together


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
    rows = -(-q_len // tile)
    own, first = (x.expand(batch).repeat_interleave(heads)[:, None] for x in (shift, first))
    own = own + torch.arange(0, q_len, tile, device=columns.device)
    columns, offsets = columns.flatten(0, 1), offsets.flatten(0, 1)
    found = []
    step = max(1, _BUDGET // max(1, rows * (kv_len // tile + 2)))
    for at in range(0, max(1, len(columns)), step):
        some = slice(at, at + step)
        runs, singles = _index(columns[some], offsets[some], own[some], first[some], tile)
        found.append((Runs(runs[0] + at, *runs[1:]), Singles(singles[0] + at, *singles[1:])))
    return (
        Runs(*(torch.cat(x) for x in zip(*(f[0] for f in found)))),
        Singles(*(torch.cat(x) for x in zip(*(f[1] for f in found)))),
    )


def _index(
    columns: Tensor, offsets: Tensor, own: Tensor, first: Tensor, tile: int
) -> tuple[Runs, Singles]:
    """The same for some heads: columns, offsets (G, Lkv), own (G, rows), first (G, 1).

    own is the key that belongs to each row block's first row.
    """
    group, kv_len = columns.shape
    rows = own.shape[1]
    starts = _walk(offsets, own, first, tile).t()  # (group * rows, steps), ascending, then -1
    cell, step = ((starts >= 0) & (starts < kv_len)).nonzero(as_tuple=True)
    begin = starts[cell, step]
    bucket = torch.full((group, rows, kv_len // tile + 2), _FAR, device=columns.device)
    bucket.flatten(0, 1)[cell, begin // tile + 1] = begin
    runs = Runs(cell // max(1, rows), cell % max(1, rows), begin)
    return runs, _singles(columns, bucket, own + tile, tile)


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


def _walk(offsets: Tensor, own: Tensor, first: Tensor, tile: int) -> Tensor:
    """First keys of the runs: (steps, G * rows) int64, ascending along steps, then -1."""
    group, kv_len = offsets.shape
    rows, device = own.shape[1], offsets.device
    places = torch.arange(kv_len, device=device)
    # below[t]: the largest chosen offset <= t, or -1.
    below = torch.where(offsets, places, -1).cummax(1).values
    # Places u = -tile ... kv_len - 1 of the walk stand at u + tile; -tile itself is the end.
    after = below.new_full((group, kv_len + tile), -tile)
    before = below[:, : kv_len - 1]
    after[:, tile + 1 :] = torch.where(before >= 0, torch.minimum(places[1:] - tile, before), -tile)
    base = torch.arange(group, device=device)[:, None] * (kv_len + tile) + tile
    after = (after + base).reshape(-1)

    from_first = own - first
    top = from_first + tile - 1
    largest = below.gather(1, top.clamp(0, kv_len - 1))
    u = torch.minimum(largest, from_first)
    u = torch.where((largest >= 0) & (top >= 0), u, -tile)
    at = (u + base).reshape(-1)
    steps = (kv_len + tile) // tile + 1
    walked = torch.empty(steps, group * rows, dtype=torch.int64, device=device)
    for step in range(steps):
        walked[step] = at
        at = after[at]
    walked = walked - base.expand(-1, rows).reshape(-1)
    return (own.reshape(-1) - walked).masked_fill(walked == -tile, -1)
