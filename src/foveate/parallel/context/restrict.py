"""A layout cut down to some of its queries and keys, or to some of its heads.

Tiles stay as they are. A query or key that isn't there gets index -1, tiles and entries of which
nothing is left are dropped, and key and row ranges are counted anew in what is left.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.ops import Layout


def restricted(layout: Layout, queries: Tensor, keys: Tensor) -> Layout:
    """What `queries` (n,) see of `keys` (m,), numbered in the order in which they are given."""
    device = layout.device
    q_rows, q_keep, q_count = _numbered(
        layout.q_index, layout.q_len, layout.q_tile, queries.to(device)
    )
    kv_rows, kv_keep, kv_count = _numbered(
        layout.kv_index, layout.kv_len, layout.kv_tile, keys.to(device)
    )
    batches, heads = layout.groups
    tiles, cols = layout.q_tiles, layout.cols.long()
    group, row = layout.entry_rows // max(1, tiles), layout.entry_rows % max(1, tiles)
    ordinary = cols < layout.kv_tiles
    gathered = _gathered(layout, kv_keep, kv_count)
    kept = q_keep[row] & (~ordinary | kv_keep[cols.clamp_max(max(0, layout.kv_tiles - 1))])
    kept &= _some(layout.groups, group, row, q_rows, layout.q_tile, q_keep)
    if gathered is not None:
        lists = (cols - layout.kv_tiles).clamp_min(0)
        kept &= ordinary | (gathered >= 0).any(1)[lists]
    new_row, new_col = q_keep.cumsum(0) - 1, kv_keep.cumsum(0) - 1
    left = int(q_keep.sum())
    at = (group * left + new_row[row])[kept]
    moved = torch.where(
        ordinary, new_col[cols.clamp_max(max(0, layout.kv_tiles - 1))],
        cols - layout.kv_tiles + int(kv_keep.sum()),
    )[kept]  # fmt: skip
    counts = torch.bincount(at, minlength=batches * heads * left)
    ends = counts.cumsum(0).reshape(batches, heads, left)
    first = torch.zeros(batches * heads, dtype=torch.int64, device=device)
    if left:
        first = (ends.reshape(-1) - counts).reshape(-1, left)[:, 0]
    ptr = torch.cat((first.reshape(batches, heads, 1), ends), -1)
    return Layout(
        q_len=len(queries),
        kv_len=len(keys),
        q_tile=layout.q_tile,
        kv_tile=layout.kv_tile,
        ptr=ptr,
        cols=moved.int(),
        kinds=layout.kinds[kept],
        bits=layout.bits,
        gathered=None if gathered is None else gathered.int(),
        q_index=q_rows.int(),
        kv_index=kv_rows.int(),
        key_range=_ranges(layout.key_range, layout.q_tile, q_keep, kv_count),
        row_range=_ranges(layout.row_range, layout.kv_tile, kv_keep, q_count),
    )


def _numbered(
    index: Tensor | None, length: int, tile: int, chosen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Virtual rows numbered by `chosen`: (rows left, which tiles are left, rows left before each).

    Rows: (1 or B, 1 or H, tiles left * tile), -1 where nobody stands; counts: (rows + 1,).
    """
    local = torch.full((length + 1,), -1, device=chosen.device)
    local[chosen] = torch.arange(len(chosen), device=chosen.device)
    if index is None:
        index = torch.arange(length, device=chosen.device)[None, None]
    rows = local[index.long()]  # -1 reads the last entry, which is -1
    count = rows.shape[-1]
    rows = pad(rows, (0, -count % tile), value=-1)
    cut = rows.reshape(*rows.shape[:2], -1, tile)
    keep = (cut >= 0).any(3).flatten(0, 1).any(0)
    before = pad(keep.repeat_interleave(tile).long().cumsum(0), (1, 0))[: count + 1]
    return cut[:, :, keep].flatten(2), keep, before


def _some(
    groups: tuple[int, int], group: Tensor, row: Tensor, rows: Tensor, tile: int, keep: Tensor
) -> Tensor:
    """For each entry, whether its own group has a query in its tile."""
    there = torch.zeros(*groups, len(keep), dtype=torch.bool, device=rows.device)
    cut = (rows.reshape(*rows.shape[:2], -1, tile) >= 0).any(3)
    there[:, :, keep] = cut.expand(*groups, -1)
    return there.reshape(-1, len(keep))[group, row]


def _gathered(layout: Layout, keep: Tensor, count: Tensor) -> Tensor | None:
    """Lists of single keys in the new numbers; -1 where their tile is gone."""
    if layout.gathered is None:
        return None
    old = layout.gathered.long()
    real = old >= 0
    safe = old.clamp_min(0)
    return count[safe].masked_fill(~real | ~keep[safe // layout.kv_tile], -1)


def _ranges(table: Tensor | None, tile: int, keep: Tensor, count: Tensor) -> Tensor | None:
    """Ranges (.., .., N, 2) of the rows that are left, their ends counted in what is left."""
    if table is None:
        return None
    ends = count[table.long().clamp(0, len(count) - 1)]
    ends = pad(ends, (0, 0, 0, -ends.shape[2] % tile))
    cut = ends.reshape(*ends.shape[:2], -1, tile, 2)
    return cut[:, :, keep].flatten(2, 3).int()


def of_heads(layout: Layout, heads: tuple[int, int, int]) -> Layout:
    """A layout for query heads first ... first + count - 1 of `of`, given as (first, count, of)."""
    first, count, of = heads
    many = layout.groups[1]
    if many == 1 or count == of:
        return layout
    share = of // many
    if first % share == 0 and count % share == 0:
        groups = list(range(first // share, (first + count) // share))
    elif first // share == (first + count - 1) // share:
        groups = [first // share]
    else:
        groups = [(first + h) // share for h in range(count)]
    pick = torch.tensor(groups, device=layout.device)
    starts, ends = layout.ptr[:, pick, :-1], layout.ptr[:, pick, 1:]
    sizes = (ends - starts).reshape(-1)
    total = sizes.cumsum(0)
    within = torch.arange(int(sizes.sum()), device=layout.device)
    within = within - (total - sizes).repeat_interleave(sizes)
    entries = starts.reshape(-1).repeat_interleave(sizes) + within
    new_ends = total.reshape(ends.shape)
    new_first = (total - sizes).reshape(ends.shape)[..., :1]

    def some(table: Tensor | None) -> Tensor | None:
        return table if table is None or table.shape[1] == 1 else table[:, pick]

    return Layout(
        q_len=layout.q_len,
        kv_len=layout.kv_len,
        q_tile=layout.q_tile,
        kv_tile=layout.kv_tile,
        ptr=torch.cat((new_first, new_ends), -1),
        cols=layout.cols[entries],
        kinds=layout.kinds[entries],
        bits=layout.bits,
        gathered=layout.gathered,
        q_index=some(layout.q_index),
        kv_index=some(layout.kv_index),
        key_range=some(layout.key_range),
        row_range=some(layout.row_range),
    )
