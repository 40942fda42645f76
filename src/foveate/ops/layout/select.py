"""Layouts from a choice: whole tiles, and single keys beside them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.layout.build import Boxes, Found, assemble, build, evaluate, tile_sizes
from foveate.ops.layout.core import Layout
from foveate.ops.masks.base import Mask, positions


def from_tiles(
    tiles: Tensor,
    q_len: int,
    kv_len: int,
    tile: int | tuple[int, int],
    within: Mask | None = None,
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    q_index: Tensor | None = None,
) -> Layout:
    """Chosen tiles, their elements limited by a mask; see `Layout.from_tiles`."""
    sizes = tile_sizes(tile)
    rows = q_len if q_index is None else q_index.shape[-1]
    tiles = _choice("tiles", tiles, (-(-rows // sizes[0]), -(-kv_len // sizes[1])))
    if within is not None:
        within._check(q_len, kv_len)
    q_pos, k_pos = positions(q_len, kv_len, q_positions, kv_positions, tiles.device)
    return _indexed(build(within, _at(q_pos, q_index), k_pos, sizes, tiles), q_len, q_index)


def _at(q_pos: Tensor, q_index: Tensor | None) -> Tensor:
    """Positions by virtual row; where no query stands, of the first one."""
    if q_index is None:
        return q_pos
    rows = q_index[:, 0].long().clamp_min(0)
    batches = max(len(q_pos), len(rows))
    return q_pos.expand(batches, -1).gather(1, rows.expand(batches, -1))


def _indexed(layout: Layout, q_len: int, q_index: Tensor | None) -> Layout:
    if q_index is None:
        return layout
    return replace(layout, q_len=q_len, q_index=q_index.int(), _counts=[])


def from_selection(
    tiles: Tensor,
    keys: Tensor,
    q_len: int,
    kv_len: int,
    tile: int | tuple[int, int],
    within: Mask | None = None,
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    q_index: Tensor | None = None,
) -> Layout:
    """Chosen tiles and single keys together; see `Layout.from_selection`."""
    sizes = tile_sizes(tile)
    virtual = q_len if q_index is None else q_index.shape[-1]
    tiles = _choice("tiles", tiles, (-(-virtual // sizes[0]), -(-kv_len // sizes[1])))
    keys = _choice("keys", keys, (-(-virtual // sizes[0]), kv_len))
    batches, heads = (max(a, b) for a, b in zip(tiles.shape[:2], keys.shape[:2]))
    keys = keys & ~tiles.repeat_interleave(sizes[1], -1)[..., :kv_len]
    keys = keys.expand(batches, heads, -1, -1)
    base = from_tiles(
        tiles.expand(batches, heads, -1, -1),
        q_len,
        kv_len,
        sizes,
        within,
        q_positions,
        kv_positions,
        q_index,
    )
    batches, heads = base.groups
    keys = keys.expand(batches, heads, -1, -1)
    listed, rows = _gather(keys.reshape(-1, kv_len), sizes[1])
    q_pos, k_pos = positions(q_len, kv_len, q_positions, kv_positions, tiles.device)
    boxes = Boxes(_at(q_pos, q_index), k_pos, sizes)
    found = []
    for group in range(batches * heads):
        b, h = divmod(group, heads)
        mine = (rows // base.q_tiles == group).nonzero()[:, 0]
        single = _singles(within, boxes, k_pos, listed[mine], rows[mine] % base.q_tiles, (b, h))
        keep, kinds, bits = single
        found.append(
            _join(base, group, rows[mine][keep] % base.q_tiles, mine[keep], kinds[keep], bits)
        )
    made = assemble(
        found,
        (batches, heads),
        (virtual, kv_len),
        sizes,
        gathered=listed.int() if len(listed) else None,
    )
    return _indexed(made, q_len, q_index)


def _choice(name: str, chosen: Tensor, shape: tuple[int, int]) -> Tensor:
    if chosen.dtype != torch.bool or chosen.dim() != 4 or tuple(chosen.shape[2:]) != shape:
        raise InputError(
            f"{name}: expected bool (B or 1, H or 1, {shape[0]}, {shape[1]}), got "
            f"{chosen.dtype} of shape {tuple(chosen.shape)}."
        )
    return chosen


def _gather(keys: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Chosen keys, bool (rows, Lkv), as lists of `tile`: (lists (m, tile), row of each (m,))."""
    row, key = keys.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(keys))
    lists = -(-counts // tile)
    first = lists.cumsum(0) - lists
    rank = torch.arange(len(row), device=keys.device) - (counts.cumsum(0) - counts)[row]
    total = int(lists.sum())
    listed = torch.full((total, tile), -1, device=keys.device)
    listed[first[row] + rank // tile, rank % tile] = key
    return listed, torch.repeat_interleave(torch.arange(len(keys), device=keys.device), lists)


def _singles(
    within: Mask | None,
    boxes: Boxes,
    k_pos: Tensor,
    listed: Tensor,
    rows: Tensor,
    group: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Kinds and bits of lists of single keys under a mask, as `evaluate` gives them."""
    q, k, q_lo, q_hi, _, _ = boxes.of(group[0])
    real = listed >= 0
    at = k_pos[group[0] if k_pos.shape[0] > 1 else 0][listed.clamp_min(0)]
    if within is None or not len(rows):
        full = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    else:
        lo = at.masked_fill(~real, torch.iinfo(torch.int64).max).amin(1)
        hi = at.masked_fill(~real, torch.iinfo(torch.int64).min).amax(1)
        sure = within._tiles(q_lo[rows], q_hi[rows], lo, hi, *group)
        full = sure.full.expand(len(rows))

    def tile(part: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r = rows[part]
        return q[r], boxes.q_real[r], at[part], real[part]

    return evaluate(within, full, tile, group, (q.shape[1], k.shape[1]))


def _join(
    base: Layout, group: int, rows: Tensor, lists: Tensor, kinds: Tensor, bits: Tensor
) -> Found:
    """The tiles of one group of `base` and its single keys, in row order, tiles first."""
    ptr = base.ptr.reshape(-1, base.q_tiles + 1)[group]
    mine = slice(int(ptr[0]), int(ptr[-1]))
    base_rows = base.entry_rows[mine] % max(1, base.q_tiles)
    base_kinds = base.kinds[mine]
    all_rows = torch.cat((base_rows, rows))
    all_cols = torch.cat((base.cols[mine].long(), lists + base.kv_tiles))
    marks = torch.cat((base_kinds.clamp_max(1), kinds))
    which = torch.cat(
        (base_kinds.long() - 1, torch.arange(len(bits), device=rows.device).new_zeros(len(kinds)))
    )
    which[len(base_kinds) :][kinds > 0] = torch.arange(len(bits), device=rows.device) + len(
        base.bits
    )
    order = torch.argsort(all_rows, stable=True)
    marks, which = marks[order], which[order]
    return Found(
        all_rows[order], all_cols[order], marks, torch.cat((base.bits, bits))[which[marks > 0]]
    )
