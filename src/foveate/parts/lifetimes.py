"""A layout of keys that are each seen by an interval of rows, and of rows that each see a span.

Where a key is dropped for good once it is dropped, rows first_j ... last_j - 1 see key j and no
other row does. Neighbouring rows then see nearly the same keys, so that a query tile lists few more
than one row sees: key tiles of which it sees most are visited whole, other keys are gathered one by
one. That is never more than one entry per (tile, key) pair that is alive, whatever the length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops import Layout
from foveate.ops.layout.core import FULL, KEY_RANGE, ROW_RANGE

_CELLS = 1 << 24  # (query tile, key tile) pairs that are looked at in one go


def layout_of_lifetimes(
    first: Tensor, last: Tensor, q_len: int, tile: int = 64, *, gather: bool = True
) -> Layout:
    """Row r sees key j iff first_j <= r < last_j.

    Args:
        first: (B, G, Lkv) int64, G head groups.
        last: (B, G, Lkv) int64; a key with last <= first is seen by nobody.
        q_len: rows, Lq.
        tile: rows and keys of a tile, a multiple of 8.
        gather: list the keys of thinly filled key tiles one by one; False visits their whole tile.
    """
    batches, groups, kv_len = first.shape
    first, last = first.clamp(0, q_len), last.clamp(0, q_len)
    sizes = _Sizes(q_len, kv_len, tile)
    cells, lists = [], 0
    at_once = max(1, _CELLS // max(1, sizes.rows * kv_len))
    for f, n in zip(first.flatten(0, 1).split(at_once), last.flatten(0, 1).split(at_once)):
        cells.append(_alive(f, n, sizes, gather, lists))
        lists += len(cells[-1].gathered)
    gathered = torch.cat([c.gathered for c in cells])
    return Layout(
        q_len=q_len,
        kv_len=kv_len,
        q_tile=tile,
        kv_tile=tile,
        ptr=pointers(torch.cat([c.counts for c in cells]).view(batches, groups, -1)),
        cols=torch.cat([c.cols for c in cells]).int(),
        kinds=torch.cat([c.kinds for c in cells]).int(),
        bits=torch.zeros(0, tile, tile // 8, dtype=torch.uint8, device=first.device),
        gathered=gathered.int() if len(gathered) else None,
        row_range=torch.stack((first, last), -1).int(),
    )


def pointers(counts: Tensor) -> Tensor:
    """(B, G, Tq + 1) offsets from the number of entries (B, G, Tq) of each query tile."""
    ends = counts.flatten().cumsum(0).view(counts.shape)
    return torch.cat((ends[..., :1] - counts[..., :1], ends), -1)


class _Sizes(NamedTuple):
    q_len: int
    kv_len: int
    tile: int

    @property
    def rows(self) -> int:
        return -(-self.q_len // self.tile)

    @property
    def cols(self) -> int:
        return -(-self.kv_len // self.tile)


class _Cells(NamedTuple):
    """Entries of some groups: how many each query tile has, columns, kinds, and lists of keys."""

    counts: Tensor
    cols: Tensor
    kinds: Tensor
    gathered: Tensor


def listed(first: Tensor, last: Tensor, q_len: int, tile: int) -> tuple[Tensor, Tensor]:
    """Which keys any row of each query tile sees: (query tile, key), both (m,) int64, sorted.

    first, last: (n, Lkv), within 0 ... q_len. Query tiles count through all n groups.
    """
    rows = -(-q_len // tile)
    if len(first) == 1:
        return _running(first[0], last[0], rows, tile)
    start = torch.arange(rows, device=first.device)[:, None] * tile
    begins, ends = first[:, None], last[:, None]
    alive = (begins < start + tile) & (ends > start) & (ends > begins)
    group, row, key = alive.nonzero(as_tuple=True)
    return group * rows + row, key


def _running(first: Tensor, last: Tensor, rows: int, tile: int) -> tuple[Tensor, Tensor]:
    """As `listed`, for one group: each tile's list is made from that of the tile before it.

    What ended is dropped and what begins is added, so that no tile looks at all keys.
    """
    keys = (last > first).nonzero()[:, 0]
    begins = first[keys] // tile
    keys, begins = keys[begins.argsort(stable=True)], begins.sort(stable=True).values
    ends = (last[keys] - 1) // tile
    number = torch.arange(rows + 1, device=keys.device)
    bounds = torch.searchsorted(begins, number).tolist()
    held = keys.new_zeros(0)
    until = ends.new_zeros(0)
    lists = [keys.new_zeros(0)]
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        stay = until >= i
        held = torch.cat((held[stay], keys[start:stop]))
        until = torch.cat((until[stay], ends[start:stop]))
        lists.append(held)
    counts = torch.tensor([len(x) for x in lists[1:]], device=keys.device, dtype=torch.int64)
    return torch.repeat_interleave(number[:-1], counts), torch.cat(lists)


def _alive(first: Tensor, last: Tensor, sizes: _Sizes, gather: bool, lists: int) -> _Cells:
    """Entries of some groups, (n, Lkv) each; `lists` lists stand before their own."""
    tile, q_len, kv_len = sizes.tile, sizes.q_len, sizes.kv_len
    rows = len(first) * sizes.rows
    row, key = listed(first, last, q_len, tile)
    # Tiles whose rows all see a key: from the first to the one before the last of these.
    group = row // sizes.rows if len(first) > 1 else torch.zeros_like(row)
    from_tile = -(-first // tile)
    to_tile = torch.where(last == q_len, sizes.rows, last // tile)
    number = row - group * sizes.rows
    at = group * kv_len + key
    whole = (from_tile.flatten()[at] <= number) & (to_tile.flatten()[at] > number)
    cell = row * sizes.cols + (torch.arange(kv_len, device=key.device) // tile)[key]
    total = rows * sizes.cols
    there = torch.bincount(cell, minlength=total)
    size = (kv_len - torch.arange(sizes.cols, device=key.device) * tile).clamp_max(tile)
    size = size.repeat(rows)
    taken = there * 2 > size if gather else there > 0
    at = taken.nonzero()[:, 0]
    full = torch.bincount(cell[whole], minlength=total)[at] == size[at]
    tile_rows, tile_cols = at // sizes.cols, at % sizes.cols
    tile_kinds = torch.where(full, FULL, ROW_RANGE)

    rest = (~taken[cell]).nonzero()[:, 0]
    gathered, list_rows, list_kinds = _lists(row[rest], key[rest], whole[rest], rows, tile)
    tiles_of = torch.bincount(tile_rows, minlength=rows)
    lists_of = torch.bincount(list_rows, minlength=rows)
    # Row by row, its tiles first.
    tile_at = count(tile_rows) + (lists_of.cumsum(0) - lists_of)[tile_rows]
    list_at = count(list_rows) + tiles_of.cumsum(0)[list_rows]
    cols = row.new_zeros(len(tile_rows) + len(list_rows))
    kinds = torch.zeros_like(cols)
    cols[tile_at], cols[list_at] = tile_cols, count(list_rows) + sizes.cols + lists
    kinds[tile_at], kinds[list_at] = tile_kinds, list_kinds
    return _Cells(tiles_of + lists_of, cols, kinds, gathered)


def _lists(
    row: Tensor, key: Tensor, whole: Tensor, rows: int, tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Single keys, sorted by row tile, as lists of `tile`: (lists, row tile of each, its kind)."""
    n = torch.bincount(row, minlength=rows)
    lists = -(-n // tile)
    list_rows = torch.repeat_interleave(torch.arange(rows, device=key.device), lists)
    # Each row tile's lists begin at a multiple of `tile`; its keys move on by what lies between.
    gap = (lists.cumsum(0) - lists) * tile - (n.cumsum(0) - n)
    at = count(row) + torch.repeat_interleave(gap, n)
    gathered = key.new_full((len(list_rows) * tile,), -1)
    gathered[at] = key
    partial = torch.zeros(len(list_rows), dtype=torch.bool, device=key.device)
    partial[at[~whole] // tile] = True
    return gathered.view(-1, tile), list_rows, torch.where(partial, ROW_RANGE, FULL)


def count(x: Tensor) -> Tensor:
    """0 ... len(x) - 1, on its device."""
    return torch.arange(len(x), device=x.device)


def layout_of_spans(
    low: Tensor,
    high: Tensor,
    kv_len: int,
    tile: int | tuple[int, int] = 64,
    *,
    by_end: bool = False,
) -> Layout:
    """Row r sees keys low_r ... high_r - 1.

    Args:
        low: (B, H, Lq) int64.
        high: (B, H, Lq) int64; a row with high <= low sees nothing.
        kv_len: Lkv.
        tile: rows and keys of a tile, multiples of 8.
        by_end: put rows in the order of where their spans end, head by head, so that those of a
            query tile see nearly the same keys wherever in the sequence they stand.
    """
    q_tile, kv_tile = tile if isinstance(tile, tuple) else (tile, tile)
    batches, heads, q_len = low.shape
    low, high = low.clamp(0, kv_len), high.clamp(0, kv_len)
    high = torch.where(high > low, high, low)
    q_index = None
    if by_end:
        key = torch.where(high > low, high, kv_len + 1)
        order = key.argsort(dim=-1, stable=True)
        low, high = low.gather(-1, order), high.gather(-1, order)
        q_index = order.int()
    q_tiles, kv_tiles = -(-q_len // q_tile), -(-kv_len // kv_tile)
    flat_low, flat_high = low.flatten(0, 1), high.flatten(0, 1)
    counts, cols, kinds = [], [], []
    for some_low, some_high in zip(
        *(x.split(max(1, _CELLS // max(1, q_tiles * kv_tiles))) for x in (flat_low, flat_high))
    ):
        seen, full = _covered(some_low, some_high, kv_len, (q_tile, kv_tile))
        at = seen.nonzero()
        counts.append(seen.sum(-1))
        cols.append(at[:, 2])
        kinds.append(torch.where(full[at[:, 0], at[:, 1], at[:, 2]], FULL, KEY_RANGE))
    return Layout(
        q_len=q_len,
        kv_len=kv_len,
        q_tile=q_tile,
        kv_tile=kv_tile,
        ptr=pointers(torch.cat(counts).view(batches, heads, q_tiles)),
        cols=torch.cat(cols).int(),
        kinds=torch.cat(kinds).int(),
        bits=torch.zeros(0, kv_tile, q_tile // 8, dtype=torch.uint8, device=low.device),
        q_index=q_index,
        key_range=torch.stack((low, high), -1).int(),
    )


def _covered(
    low: Tensor, high: Tensor, kv_len: int, tile: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Which key tiles any row, and which all rows, of each query tile see: bool (n, Tq, Tk)."""
    n, q_len = low.shape
    q_tiles, kv_tiles = -(-q_len // tile[0]), -(-kv_len // tile[1])
    row = torch.arange(q_len, device=low.device) // tile[0]
    base = (torch.arange(n, device=low.device)[:, None] * q_tiles + row) * (kv_tiles + 1)
    some = high > low
    # Each row adds one over its run of tiles: +1 where it begins, -1 behind its end.
    touched = _runs(base, some, low // tile[1], -(-high // tile[1]), (n, q_tiles, kv_tiles))
    end = torch.where(high == kv_len, kv_tiles, high // tile[1])  # the last tile may be short
    begin = -(-low // tile[1])
    whole = _runs(base, some & (end > begin), begin, end, (n, q_tiles, kv_tiles))
    rows = (q_len - torch.arange(q_tiles, device=low.device) * tile[0]).clamp_max(tile[0])
    return touched > 0, whole == rows[:, None]


def _runs(
    base: Tensor, some: Tensor, begin: Tensor, end: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """How many of the rows have each tile in begin ... end - 1: int (n, Tq, Tk)."""
    n, q_tiles, kv_tiles = shape
    steps = torch.zeros(n * q_tiles * (kv_tiles + 1), dtype=torch.int32, device=base.device)
    one = some.int().flatten()
    steps.index_add_(0, (base + begin).flatten(), one)
    steps.index_add_(0, (base + end).flatten(), -one)
    return steps.view(n, q_tiles, kv_tiles + 1).cumsum(-1)[..., :-1]
