"""From chosen runs of keys, single keys or tiles to a layout, exactly as far as a mask allows.

Layouts made here differ by head, and building one must cost far less than running it: whole tables
are looked up or filled at once, a mask is asked element by element only about tiles that it cuts,
and about those that differ by nothing but where they stand only once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops import Layout, Mask
from foveate.ops.layout import bits as bitset
from foveate.ops.masks.algebra import And
from foveate.parts.tokens import Tokens

_RELATIVE = re.compile(r"(?:causal\(\)|window\(-?\d+, -?\d+\)|[&|~() ])+")
_PART = 1024
_NONE = -1


def restrict(base: Layout, tiles: Tensor) -> Layout:
    """A mask's layout, less the tiles that weren't chosen.

    Args:
        base: as `Mask.layout` makes it.
        tiles: bool (B or 1, H or 1, Tq, Tk).
    """
    table = kind_table(base)
    shape = torch.broadcast_shapes(table.shape, tiles.shape)
    kinds = table.expand(shape)
    chosen = tiles.expand(shape) & (kinds != _NONE)
    counts = chosen.sum(-1).reshape(-1)
    return Layout(
        q_len=base.q_len,
        kv_len=base.kv_len,
        q_tile=base.q_tile,
        kv_tile=base.kv_tile,
        ptr=_pointers(counts, shape[0], shape[1]),
        cols=chosen.nonzero()[:, 3].int(),
        kinds=kinds[chosen],
        bits=base.bits,
    )


def kind_table(base: Layout) -> Tensor:
    """(Bm, Hm, Tq, Tk) int32: the kind of each tile of a mask's layout, -1 where it has none."""
    table = torch.full(
        (*base.groups, base.q_tiles, base.kv_tiles), _NONE, dtype=torch.int32, device=base.device
    )
    flat = table.view(-1, base.kv_tiles)
    flat[base.entry_rows, base.cols.long()] = base.kinds
    return table


def _pointers(counts: Tensor, batches: int, heads: int) -> Tensor:
    """(B, H, Tq + 1) offsets from the number of entries of each (batch, head, query tile)."""
    ends = counts.cumsum(0).reshape(batches, heads, -1)
    starts = (ends.reshape(-1) - counts).reshape(batches, heads, -1)[..., :1]
    return torch.cat((starts, ends), -1)


class Runs(NamedTuple):
    """For each query tile, runs of `tile` keys: group, row tile and first key, all (n,) int64.

    group is b * Hq + h; runs are sorted by (group, row tile, first key) and don't overlap.
    """

    group: Tensor
    row: Tensor
    start: Tensor


class Singles(NamedTuple):
    """For each query tile, single keys: group, row tile and key, all (n,) int64, sorted so."""

    group: Tensor
    row: Tensor
    key: Tensor


@dataclass(frozen=True)
class _Grid:
    """The sizes of a layout that is being made."""

    batches: int
    heads: int
    q_len: int
    kv_len: int
    tile: int

    @property
    def rows(self) -> int:
        return -(-self.q_len // self.tile)

    @property
    def cols(self) -> int:
        return -(-self.kv_len // self.tile)


def layout_of_runs(
    runs: Runs,
    singles: Singles,
    mask: Mask,
    tokens: Tokens,
    sizes: tuple[int, int, int, int],
    tile: int,
) -> Layout:
    """The layout that visits these runs and single keys and shows what of them the mask allows.

    Runs that begin at a tile become ordinary tiles, the others gathered ones; of those each
    distinct run is stored once. No key may be listed twice for the same row tile.

    Args:
        runs: runs of `tile` keys, within 0 ... Lkv + tile - 1.
        singles: single keys beside them.
        mask: what may attend.
        tokens: of the call; positions must be regular.
        sizes: (batch, query heads, Lq, Lkv).
        tile: rows and keys of a tile; a multiple of 8.
    """
    grid = _Grid(*sizes, tile)
    cells = runs.group * grid.rows + runs.row
    steps = torch.arange(tile, device=cells.device)
    kinds, bits = _kinds(mask, tokens, grid, runs.group, runs.row, runs.start[:, None], steps)
    keep = kinds != _NONE
    cells, start, kinds = cells[keep], runs.start[keep], kinds[keep]

    inside = start % tile == 0
    named = torch.zeros(grid.kv_len + tile, dtype=torch.bool, device=cells.device)
    named[start[~inside]] = True
    number = named.cumsum(0) - 1
    first = named.nonzero()
    cols = torch.where(inside, start // tile, grid.cols + number[start])
    gathered = first + steps
    gathered = gathered.masked_fill(gathered >= grid.kv_len, -1)

    listed, list_cells = _lists(singles.group * grid.rows + singles.row, singles.key, tile, grid)
    more_kinds, more_bits = _kinds(
        mask, tokens, grid, list_cells // grid.rows, list_cells % grid.rows, listed, None
    )
    more_kinds = torch.where(more_kinds > 0, more_kinds + len(bits), more_kinds)
    list_cols = grid.cols + len(gathered) + torch.arange(len(listed), device=cells.device)
    some = more_kinds != _NONE

    list_cells, list_cols, more_kinds = list_cells[some], list_cols[some], more_kinds[some]

    # Both are in order of cells; in each cell the runs come first.
    size = grid.batches * grid.heads * grid.rows
    run_counts = torch.bincount(cells, minlength=size)
    list_counts = torch.bincount(list_cells, minlength=size)
    run_at = _count(cells) + (list_counts.cumsum(0) - list_counts)[cells]
    list_at = _count(list_cells) + run_counts.cumsum(0)[list_cells]
    table, index = bitset.distinct(torch.cat((bits, more_bits)))
    index = torch.nn.functional.pad(index + 1, (1, 0)).int()
    all_cols = torch.zeros(len(cells) + len(list_cells), dtype=torch.int32, device=cells.device)
    all_kinds = torch.zeros_like(all_cols)
    lists = torch.cat((gathered, listed)).int()
    all_cols[run_at], all_cols[list_at] = cols.int(), list_cols.int()
    all_kinds[run_at], all_kinds[list_at] = index[kinds], index[more_kinds]
    return Layout(
        q_len=grid.q_len,
        kv_len=grid.kv_len,
        q_tile=tile,
        kv_tile=tile,
        ptr=_pointers(run_counts + list_counts, grid.batches, grid.heads),
        cols=all_cols,
        kinds=all_kinds,
        bits=table,
        gathered=lists if len(lists) else None,
    )


def _count(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def _lists(cells: Tensor, keys: Tensor, tile: int, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Single keys, sorted by cell, as lists: (lists (n, tile), -1 is no key; cell of each (n,))."""
    counts = torch.bincount(cells, minlength=grid.batches * grid.heads * grid.rows)
    lists = -(-counts // tile)
    skipped = (lists.cumsum(0) - lists) * tile - (counts.cumsum(0) - counts)
    listed = keys.new_full((int(lists.sum()) * tile,), -1)
    listed[torch.arange(len(keys), device=keys.device) + skipped[cells]] = keys
    return listed.view(-1, tile), torch.repeat_interleave(
        torch.arange(len(counts), device=keys.device), lists
    )


# -- what the mask says of each tile -----------------------------------------------------------
def _conjuncts(mask: Mask) -> list[Mask]:
    if isinstance(mask, And):
        return [part for one in mask.parts for part in _conjuncts(one)]
    return [mask]


def is_relative(mask: Mask) -> bool:
    """Whether distances alone decide."""
    return _RELATIVE.fullmatch(mask.spec) is not None


def _kinds(
    mask: Mask,
    tokens: Tokens,
    grid: _Grid,
    group: Tensor,
    row: Tensor,
    keys: Tensor,
    steps: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Kind of each tile, and bit tiles.

    Args:
        mask: what may attend.
        tokens: of the call.
        grid: sizes.
        group: (n,) b * Hq + h.
        row: (n,) row tile.
        keys: (n, tile) keys of each tile, -1 is none; or (n, 1) the first of a run.
        steps: arange(tile) if keys are the firsts of runs.

    Returns:
        kinds (n,) int64: -1 nothing is seen, 0 all, i > 0 bits[i - 1]; and bits.
    """
    n, tile = len(group), grid.tile
    kinds = torch.zeros(n, dtype=torch.int64, device=group.device)
    bits = torch.zeros(0, tile, tile // 8, dtype=torch.uint8, device=group.device)
    if not n:
        return kinds, bits
    parts = _conjuncts(mask)
    near = [m for m in parts if steps is not None and is_relative(m)]
    rest = [m for m in parts if steps is None or not is_relative(m)]
    ask = torch.zeros(n, dtype=torch.bool, device=group.device)
    if near:
        b = group // grid.heads if len(tokens.shift) > 1 else torch.zeros_like(group)
        kinds, bits = _relative_kinds(near, keys[:, 0] - (row * tile + tokens.shift[b]), tile)
        # At the edges what is set may lie outside.
        edge = ((row + 1) * tile > grid.q_len) | (keys[:, 0] + tile > grid.kv_len)
        ask = edge & (kinds > 0)
    if rest:
        none, full = _certain(rest, tokens, grid, group, row, keys, steps)
        kinds = torch.where(none, _NONE, kinds)
        ask |= ~full
    ask &= kinds != _NONE
    at = ask.nonzero()[:, 0]
    if len(at):
        seen = _elements(mask, tokens, grid, group[at], row[at], keys[at], steps)
        kinds[at] = torch.where(seen.kinds > 0, seen.kinds + len(bits), seen.kinds)
        bits = torch.cat((bits, seen.bits))
    return kinds, bits


def _relative_kinds(near: list[Mask], offset: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Kinds and bits of runs that begin `offset` keys after their tile's first row's own key."""
    low = int(offset.min())
    there = torch.zeros(int(offset.max()) - low + 1, dtype=torch.bool, device=offset.device)
    there[offset - low] = True
    first = there.nonzero()[:, 0] + low
    q0 = torch.zeros_like(first)
    none, full = torch.zeros_like(first, dtype=torch.bool), torch.ones_like(first, dtype=torch.bool)
    for mask in near:
        sure = mask._tiles(q0, q0 + (tile - 1), first, first + (tile - 1), 0, 0)
        none, full = none | sure.none, full & sure.full
    kinds = torch.where(none, _NONE, 0)
    at = (~none & ~full).nonzero()[:, 0]
    steps = torch.arange(tile, device=offset.device)
    seen = torch.ones(len(at), tile, tile, dtype=torch.bool, device=offset.device)
    for mask in near:
        seen &= mask._element(steps[None, None], (first[at, None] + steps)[..., None], 0, 0)
    some, every = seen.flatten(1).any(1), seen.flatten(1).all(1)
    partial = some & ~every
    kinds[at] = torch.where(partial, partial.cumsum(0), torch.where(every, 0, _NONE))
    table = kinds.new_full((len(there),), _NONE)
    table[first - low] = kinds
    return table[offset - low], bitset.pack(seen[partial])


def _places(
    tokens: Tokens, grid: _Grid, group: Tensor, row: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Positions of each tile's first row (n,) and of its keys (as `keys`); regular positions."""
    b = group // grid.heads
    q0 = tokens.q_pos[b if len(tokens.q_pos) > 1 else torch.zeros_like(b), 0]
    k0 = tokens.k_pos[b if len(tokens.k_pos) > 1 else torch.zeros_like(b), 0]
    return q0 + row * grid.tile, k0[:, None] + keys


def _certain(
    masks: list[Mask],
    tokens: Tokens,
    grid: _Grid,
    group: Tensor,
    row: Tensor,
    keys: Tensor,
    steps: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(n,) surely nothing, surely everything, of the real rows and keys of each tile."""
    q_lo, pos = _places(tokens, grid, group, row, keys)
    q_hi = q_lo + (torch.clamp((row + 1) * grid.tile, max=grid.q_len) - 1 - row * grid.tile)
    if steps is not None:
        k_lo = pos[:, 0]
        k_hi = k_lo + torch.clamp(grid.kv_len - 1 - keys[:, 0], max=grid.tile - 1)
    else:
        real = keys >= 0
        big = torch.iinfo(torch.int64).max
        k_lo = pos.masked_fill(~real, big).amin(1)
        k_hi = pos.masked_fill(~real, -big).amax(1)
    none = torch.zeros(len(group), dtype=torch.bool, device=group.device)
    full = torch.ones_like(none)
    for mask in masks:
        for at, b, h in _by_mask_group(mask, grid, group):
            sure = mask._tiles(q_lo[at], q_hi[at], k_lo[at], k_hi[at], b, h)
            none[at] |= sure.none
            full[at] &= sure.full
    return none, full


def _by_mask_group(mask: Mask, grid: _Grid, group: Tensor) -> list[tuple[Tensor | slice, int, int]]:
    """Which entries ask which of the mask's own batch entries and heads."""
    batches, heads = mask.groups()
    if batches == heads == 1:
        return [(slice(None), 0, 0)]
    b = group // grid.heads if batches > 1 else torch.zeros_like(group)
    h = group % grid.heads // (grid.heads // heads)
    found: list[tuple[Tensor | slice, int, int]] = []
    for i in range(batches):
        for j in range(heads):
            at = ((b == i) & (h == j)).nonzero()[:, 0]
            if len(at):
                found.append((at, i, j))
    return found


class _Seen(NamedTuple):
    kinds: Tensor
    bits: Tensor


def _elements(
    mask: Mask,
    tokens: Tokens,
    grid: _Grid,
    group: Tensor,
    row: Tensor,
    keys: Tensor,
    steps: Tensor | None,
) -> _Seen:
    """Look into tiles element by element, as in `_kinds`."""
    index = keys if steps is None else keys + steps
    index = index.masked_fill(index >= grid.kv_len, -1)
    kinds = torch.full_like(group, _NONE)
    packed = [torch.zeros(0, grid.tile, grid.tile // 8, dtype=torch.uint8, device=group.device)]
    count = 0
    rows = torch.arange(grid.tile, device=group.device)
    for at, b, h in _by_mask_group(mask, grid, group):
        where = torch.arange(len(group), device=group.device)[at]
        for part in where.split(_PART):
            q0, pos = _places(tokens, grid, group[part], row[part], index[part])
            seen = mask._element((q0[:, None] + rows)[:, None, :], pos[:, :, None], b, h)
            real = (index[part] >= 0)[:, :, None] & (
                (row[part][:, None] * grid.tile + rows) < grid.q_len
            )[:, None, :]
            seen = seen & real
            some, every = seen.flatten(1).any(1), (seen | ~real).flatten(1).all(1)
            partial = some & ~every
            kinds[part] = torch.where(
                partial, partial.cumsum(0) + count, torch.where(some, 0, _NONE)
            )
            packed.append(bitset.pack(seen[partial]))
            count += int(partial.sum())
    return _Seen(kinds, torch.cat(packed))
