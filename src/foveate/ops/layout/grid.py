"""Layouts of neighborhoods over multi-axis tiles, found axis by axis.

A grid of tokens is cut into tiles of T_1 x ... x T_n queries and T'_1 x ... x T'_n keys, each a run
of consecutive slots, so that kernels which iterate over runs serve any number of axes. With
dilation, tiles hold tokens of one residue. Starts and ends of windows rise along an axis, so that a
query tile with first query a and last query z needs the keys from start(a) to end(z): tiles
floor(start(a) / T') to ceil(end(z) / T') - 1 of each axis, and of the grid their product. A tile is
full, or its elements are the product of its axes' patterns, of which few differ: nothing is looked
at twice, and nothing as large as (queries, keys) is made. Where a side is no multiple of its tile,
its last tile has empty slots.

Source: arXiv 2504.16922 (token permutation; static tiling of keys).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.layout import bits as bitset
from foveate.ops.layout.core import Layout
from foveate.ops.masks.axis import Axis
from foveate.ops.masks.grid import neighborhood

Tile = tuple[int, ...]


class AxisTiles(NamedTuple):
    """The query tiles of one axis and the key tiles that each visits.

    slots (T, tile) coordinates, -1 is none; first, number (T,) of the key tiles; ranges (E, tile,
    2) for each visit, query tile by query tile: the keys that each query sees, as slots of the key
    tile; queries that don't exist see all.
    """

    slots: Tensor
    first: Tensor
    number: Tensor
    ranges: Tensor


def axis_slots(axis: Axis, tile: int) -> tuple[Tensor, Tensor]:
    """(coordinates (T, tile), -1 where there is none; residue of each tile (T,))."""
    parts, residues = [], []
    for residue in range(axis.dilation):
        length = int(axis.residue_length(residue))
        tiles = -(-length // tile)
        inner = torch.arange(tiles * tile).view(tiles, tile)
        parts.append((residue + inner * axis.dilation).masked_fill(inner >= length, -1))
        residues.append(torch.full((tiles,), residue))
    return torch.cat(parts), torch.cat(residues)


def spans(axis: Axis, tile: int) -> tuple[Tensor, Tensor]:
    """(start of the first query's window, end of the last one's) of each query tile, (T,) each.

    Windows rise, so these are the keys that the tile needs; in coordinates of its residue.
    """
    inner, length = _first(axis, tile)
    last = torch.minimum(inner + tile, length) - 1
    return axis.start(inner, length), axis.end(last, length)


def visits(axis: Axis, q_tile: int, kv_tile: int) -> tuple[Tensor, Tensor]:
    """(first, past the last) key tile that each query tile of an axis visits, (T,) each."""
    _, residue = axis_slots(axis, q_tile)
    tiles = -(-torch.as_tensor(axis.residue_length(torch.arange(axis.dilation))) // kv_tile)
    offset = (tiles.cumsum(0) - tiles)[residue]
    start, end = spans(axis, q_tile)
    return offset + start // kv_tile, offset + -(-end // kv_tile)


def _first(axis: Axis, tile: int) -> tuple[Tensor, Tensor]:
    """Where in its residue each tile's first coordinate is, and how many the residue has."""
    slots, residue = axis_slots(axis, tile)
    return slots[:, 0] // axis.dilation, torch.as_tensor(axis.residue_length(residue))


def axis_tiles(axis: Axis, q_tile: int, kv_tile: int) -> AxisTiles:
    """Which key tiles the query tiles of one axis visit, and which of their keys are seen."""
    slots, _ = axis_slots(axis, q_tile)
    inner, length = _first(axis, q_tile)
    first, end = visits(axis, q_tile, kv_tile)
    count = end - first
    row = torch.repeat_interleave(torch.arange(len(count)), count)
    rank = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    i = inner[:, None] + torch.arange(q_tile)
    real = i < length[:, None]
    i = torch.minimum(i, length[:, None] - 1)
    lo, hi = axis.start(i, length[:, None]), axis.end(i, length[:, None])
    key = ((axis.start(inner, length) // kv_tile)[row] + rank)[:, None] * kv_tile
    lo, hi = (lo[row] - key).clamp(0, kv_tile), (hi[row] - key).clamp(0, kv_tile)
    lo, hi = lo.where(real[row], 0), hi.where(real[row], kv_tile)
    return AxisTiles(slots, first, count, torch.stack((lo, hi), -1))


@dataclass(frozen=True, eq=False)
class GridLayout:
    """Tiles of a grid, its tokens in the order of the tiles.

    Attributes:
        q_slots: (Nq,) token of each query slot, -1 for none.
        kv_slots: (Nk,) likewise of keys.
        packed: the layout of calls whose queries and keys lie in their slots.
        tokens: of the grid, and those beside it.
    """

    q_slots: Tensor
    kv_slots: Tensor
    packed: Layout
    tokens: int

    @cached_property
    def row_by_row(self) -> Layout:
        """The layout of calls whose tokens lie row by row."""
        with torch.inference_mode(False):
            return self.indexed()

    @cached_property
    def where(self) -> Tensor:
        """(tokens,) the query slot of each token: what puts results back in their order."""
        with torch.inference_mode(False):  # what is kept must serve training, too
            slots = torch.arange(len(self.q_slots), device=self.q_slots.device)
            real = self.q_slots >= 0
            empty = torch.empty_like(slots[: self.tokens])
            return empty.index_copy(0, self.q_slots[real], slots[real])

    def indexed(
        self, q_positions: Tensor | None = None, kv_positions: Tensor | None = None
    ) -> Layout:
        """The layout of a call with its tokens in any order; slots become row indices.

        Args:
            q_positions: (tokens,) which token each query is; None is row by row.
            kv_positions: likewise of keys. No index is kept where slots and order agree.
        """
        q_index = _index(self.q_slots, self.tokens, q_positions)
        kv_index = _index(self.kv_slots, self.tokens, kv_positions)
        p = self.packed
        if q_index is None and kv_index is None:
            return p
        return Layout(
            self.tokens, self.tokens, p.q_tile, p.kv_tile, p.ptr, p.cols, p.kinds, p.bits,
            q_index=q_index, kv_index=kv_index,
        )  # fmt: skip


def _index(slots: Tensor, tokens: int, positions: Tensor | None) -> Tensor | None:
    if positions is not None:
        where = torch.full((tokens + 1,), -1, device=slots.device)
        where[positions] = torch.arange(tokens, device=slots.device)
        slots = where[slots]  # the last entry stays -1 and serves slots of -1
    if torch.equal(slots, torch.arange(tokens, device=slots.device)):
        return None
    return slots.int()[None, None]


@lru_cache(maxsize=64)
def grid_layout(
    mask: neighborhood,
    q_tile: Tile,
    kv_tile: Tile,
    beside: tuple[int, int] = (0, 0),
    device: torch.device | str = "cpu",
) -> GridLayout:
    """The tiles that a neighborhood visits; kept, as masks' layouts are.

    Args:
        mask: over the grid's tokens.
        q_tile: of queries, on each axis; their product is a multiple of 8.
        kv_tile: of keys, likewise.
        beside: tokens before and after those of the grid that see everything and are seen by all,
            such as a class token or text.
        device: where the lists go.

    Raises:
        InputError: tiles of another rank, or of a size that kernels don't take.
    """
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        if len(tile) != len(mask.axes) or min(tile) < 1 or math.prod(tile) % 8:
            raise InputError(
                f"{name}={tile}: expected {len(mask.axes)} sizes whose product is a multiple of 8."
            )
    with torch.inference_mode(False):
        made = _with_beside(_build(mask, q_tile, kv_tile), mask.tokens, beside)
        if torch.device(device).type == "cpu":
            return made
        return GridLayout(
            made.q_slots.to(device), made.kv_slots.to(device), made.packed.to(device), made.tokens
        )


def _build(mask: neighborhood, q_tile: Tile, kv_tile: Tile) -> GridLayout:
    axes = [axis_tiles(*x) for x in zip(mask.axes, q_tile, kv_tile)]
    kv_axes = [axis_slots(*x)[0] for x in zip(mask.axes, kv_tile)]
    row, parts = _product([a.number for a in axes])
    col = torch.zeros_like(row)
    kind = torch.zeros_like(row)
    patterns: list[Tensor] = []
    tile_of = _places(row, [len(a.number) for a in axes])
    for axis, slots, t, rank, size in zip(axes, kv_axes, tile_of, parts, kv_tile):
        which, shapes = _distinct(axis.ranges, size)
        before = axis.number.cumsum(0) - axis.number
        col = col * len(slots) + axis.first[t] + rank
        kind = kind * len(shapes) + which[before[t] + rank]
        patterns.append(shapes)
    partial = kind.nonzero()[:, 0]  # pattern 0 of an axis is everything
    found, at = torch.unique(kind[partial], return_inverse=True)
    kinds = torch.zeros_like(row, dtype=torch.int32)
    kinds[partial] = (at + 1).int()
    count = math.prod(len(a.number) for a in axes)
    ends = torch.bincount(row, minlength=count).cumsum(0)
    q_slots = _flat([a.slots for a in axes], mask.shape)
    kv_slots = _flat(kv_axes, mask.shape)
    layout = Layout(
        q_len=len(q_slots),
        kv_len=len(kv_slots),
        q_tile=math.prod(q_tile),
        kv_tile=math.prod(kv_tile),
        ptr=torch.cat((ends.new_zeros(1), ends))[None, None],
        cols=col.int(),
        kinds=kinds,
        bits=_bits(found, patterns, kv_tile),
    )
    return GridLayout(q_slots, kv_slots, layout, mask.tokens)


def _product(counts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """All combinations of each tile's visits: (tile of each, its rank on each axis)."""
    total = counts[0]
    for count in counts[1:]:
        total = (total[:, None] * count).flatten()
    row = torch.repeat_interleave(torch.arange(len(total)), total)
    rank = torch.arange(len(row)) - (total.cumsum(0) - total)[row]
    parts: list[Tensor] = []
    places = _places(row, [len(c) for c in counts])
    for count, t in zip(reversed(counts), reversed(places)):
        parts.append(rank % count[t])
        rank = rank // count[t]
    return row, parts[::-1]


def _places(index: Tensor, sizes: list[int]) -> list[Tensor]:
    """An index into the product of axes as one into each."""
    found: list[Tensor] = []
    for size in reversed(sizes):
        found.append(index % size)
        index = index // size
    return found[::-1]


def _distinct(ranges: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(which pattern each visit has, the patterns (P, tile, 2)); pattern 0 is everything."""
    whole = ranges.new_tensor([0, size]).expand(1, ranges.shape[1], 2)
    partial = (ranges != whole).flatten(1).any(1).nonzero()[:, 0]
    found, at = torch.unique(ranges[partial], dim=0, return_inverse=True)
    which = torch.zeros(len(ranges), dtype=torch.int64)
    which[partial] = at + 1
    return which, torch.cat((whole, found))


def _flat(slots: list[Tensor], shape: Tile) -> Tensor:
    """Tokens in the order of tiles, from the coordinates in each axis' tiles; trailing holes go."""
    token, real = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    for one, length in zip(slots, shape):
        tiles, size = one.shape
        token = token[:, None, :, None] * length + one.clamp_min(0)[None, :, None, :]
        token = token.reshape(token.shape[0] * tiles, -1)
        real = (real[:, None, :, None] & (one >= 0)[None, :, None, :]).reshape(token.shape)
    flat = token.masked_fill(~real, -1).flatten()
    return flat[: int((flat >= 0).nonzero()[-1]) + 1]


def _bits(found: Tensor, patterns: list[Tensor], kv_tile: Tile) -> Tensor:
    """Packed bit tiles of the combinations of axis patterns that occur."""
    q_size = math.prod(p.shape[1] for p in patterns)
    packed = [bitset.pack(torch.zeros(0, math.prod(kv_tile), q_size, dtype=torch.bool))]
    for some in found.split(256):
        tile = torch.ones(len(some), 1, 1, dtype=torch.bool)
        places = _places(some, [len(p) for p in patterns])
        for which, shapes, size in zip(places, patterns, kv_tile):
            key = torch.arange(size)[:, None]
            seen = (key >= shapes[..., 0][:, None]) & (key < shapes[..., 1][:, None])
            one = seen[which]  # (n, key, query) of this axis
            tile = tile[:, :, None, :, None] & one[:, None, :, None, :]
            tile = tile.reshape(len(some), tile.shape[1] * size, tile.shape[3] * one.shape[2])
        packed.append(bitset.pack(tile))
    return torch.cat(packed)


def _with_beside(grid: GridLayout, tokens: int, beside: tuple[int, int]) -> GridLayout:
    """The same with tokens beside the grid, in tiles of their own behind its tiles."""
    before, after = beside
    more = before + after
    if not more:
        return grid
    p = grid.packed
    extra = torch.cat((torch.arange(before), before + tokens + torch.arange(after)))
    q_slots, kv_slots = (
        torch.cat((_shifted(slots, before, tile), extra))
        for slots, tile in ((grid.q_slots, p.q_tile), (grid.kv_slots, p.kv_tile))
    )
    q_tiles, kv_tiles = p.q_tiles, -(-len(kv_slots) // p.kv_tile)
    texts = torch.arange(p.kv_tiles, kv_tiles)
    rows = torch.arange(q_tiles)
    more_rows = torch.arange(q_tiles, -(-len(q_slots) // p.q_tile))
    all_rows = torch.cat(
        (p.entry_rows, rows.repeat_interleave(len(texts)), more_rows.repeat_interleave(kv_tiles))
    )
    every = torch.arange(kv_tiles).repeat(len(more_rows))
    all_cols = torch.cat((p.cols.long(), texts.repeat(q_tiles), every))
    # Key tiles with holes hide them from those who see everything.
    real = torch.zeros(kv_tiles * p.kv_tile, dtype=torch.bool)
    real[: len(kv_slots)] = kv_slots >= 0
    real = real.view(kv_tiles, p.kv_tile)
    holed = (~real.all(1)).nonzero()[:, 0]
    shapes, which = torch.unique(real[holed], dim=0, return_inverse=True)
    bits = bitset.pack(shapes[:, :, None].expand(-1, -1, p.q_tile))
    kind = torch.zeros(kv_tiles, dtype=torch.int32)
    kind[holed] = (which + len(p.bits) + 1).int()
    kinds = torch.cat((p.kinds, kind[all_cols[len(p.cols) :]]))
    order = torch.argsort(all_rows, stable=True)
    ends = torch.bincount(all_rows, minlength=q_tiles + len(more_rows)).cumsum(0)
    layout = Layout(
        len(q_slots), len(kv_slots), p.q_tile, p.kv_tile,
        torch.cat((ends.new_zeros(1), ends))[None, None],
        all_cols[order].int(), kinds[order], torch.cat((p.bits, bits)),
    )  # fmt: skip
    return GridLayout(q_slots, kv_slots, layout, tokens + more)


def _shifted(slots: Tensor, by: int, tile: int) -> Tensor:
    """Slots of tokens that stand `by` later, whole tiles of them."""
    holes = slots.new_full((-len(slots) % tile,), -1)
    return torch.cat((slots.where(slots < 0, slots + by), holes))


@lru_cache(maxsize=256)
def best_tiles(mask: neighborhood, q_size: int = 128, kv_size: int = 64) -> tuple[Tile, Tile]:
    """Tiles of so many queries and keys, powers of two, over which the least area is visited.

    Of tiles that visit the same the most square ones are taken.
    """
    rank = len(mask.axes)
    per_axis = [
        {(a, b): _area(axis, a, b) for a in _powers(q_size) for b in _powers(kv_size)}
        for axis in mask.axes
    ]
    best: tuple[float, int] | None = None
    found: tuple[Tile, Tile] | None = None
    for q_tile in _splits(q_size, rank):
        for kv_tile in _splits(kv_size, rank):
            area = math.prod(table[pair] for table, pair in zip(per_axis, zip(q_tile, kv_tile)))
            key = (area, sum(q_tile) + sum(kv_tile))
            if best is None or key < best:
                best, found = key, (q_tile, kv_tile)
    assert found is not None
    return found


def _area(axis: Axis, q_tile: int, kv_tile: int) -> int:
    """Elements of the tiles that are visited on one axis, slots without a token included."""
    first, end = visits(axis, q_tile, kv_tile)
    return int((end - first).sum()) * q_tile * kv_tile


def _powers(size: int) -> list[int]:
    return [1 << n for n in range(size.bit_length())]


def _splits(size: int, rank: int) -> list[Tile]:
    """All products of `rank` powers of two that make `size`."""
    if rank == 1:
        return [(size,)]
    firsts = [a for a in _powers(size) if size % a == 0]
    return [(a, *rest) for a in firsts for rest in _splits(size // a, rank - 1)]
