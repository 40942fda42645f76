"""From a mask to its layout: interval reasoning on whole tiles, elements only where needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.layout import bits as bitset
from foveate.ops.layout.core import FULL, Layout
from foveate.ops.masks.base import Mask, positions

_GRID = 1 << 18  # tiles that interval reasoning looks at in one go
_TILES = 1024  # partial tiles that are evaluated in one go
_KEPT = 64
_cache: OrderedDict[tuple[object, ...], Layout] = OrderedDict()


def tile_sizes(tile: int | tuple[int, int]) -> tuple[int, int]:
    """(query tile, key tile), checked."""
    pair = tile if isinstance(tile, tuple) else (tile, tile)
    if len(pair) != 2 or any(not isinstance(t, int) or t < 8 or t % 8 for t in pair):
        raise InputError(f"tile={tile!r}: expected a multiple of 8, or a pair of them.")
    return pair


def layout_of_mask(
    mask: Mask,
    q_len: int,
    kv_len: int,
    tile: int | tuple[int, int],
    q_positions: Tensor | None,
    kv_positions: Tensor | None,
    device: torch.device | str | None,
) -> Layout:
    """`Mask.layout`, cached where nothing but the mask and the lengths decides it."""
    sizes = tile_sizes(tile)
    key = None
    if q_positions is None and kv_positions is None and not mask.tensors:
        key = (mask.spec, q_len, kv_len, sizes, str(device))
        found = _cache.get(key)
        if found is not None:
            with suppress(KeyError):  # another thread may have dropped it meanwhile
                _cache.move_to_end(key)
            return found
    mask._check(q_len, kv_len)
    with torch.inference_mode(False):  # what is kept must serve training, too
        q_pos, k_pos = positions(q_len, kv_len, q_positions, kv_positions, device)
        layout = build(mask, q_pos, k_pos, sizes, None)
    if key is not None:
        _cache[key] = layout
        if len(_cache) > _KEPT:
            _cache.popitem(last=False)
    return layout


def build(
    mask: Mask | None, q_pos: Tensor, k_pos: Tensor, tile: tuple[int, int], chosen: Tensor | None
) -> Layout:
    """The layout of a mask, or of the part of it that lies in chosen tiles.

    Args:
        mask: what may attend; None is everything.
        q_pos: (1 or B, Lq) positions of the queries.
        k_pos: (1 or B, Lkv) positions of the keys.
        tile: (query tile, key tile).
        chosen: bool (1 or B, 1 or H, Tq, Tk), tiles to look at; None is all of them.
    """
    q_len, kv_len = q_pos.shape[1], k_pos.shape[1]
    mask_groups = (1, 1) if mask is None else mask.groups()
    tables = [mask_groups, (q_pos.shape[0], 1), (k_pos.shape[0], 1)]
    if chosen is not None:
        tables.append((chosen.shape[0], chosen.shape[1]))
    batches, heads = max(t[0] for t in tables), max(t[1] for t in tables)
    boxes = Boxes(q_pos, k_pos, tile)
    found = []
    for b in range(batches):
        for h in range(heads):
            some = None
            if chosen is not None:
                some = chosen[b if chosen.shape[0] > 1 else 0, h if chosen.shape[1] > 1 else 0]
            found.append(_group(mask, boxes, b, h, some))
    return assemble(found, (batches, heads), (q_len, kv_len), tile)


class Found(NamedTuple):
    """The entries of one group: row and column of each, its kind, and the partial ones' bits.

    `which` says which of the bits each partial entry has; None: one after the other.
    """

    rows: Tensor
    cols: Tensor
    kinds: Tensor
    bits: Tensor
    which: Tensor | None = None


def assemble(
    found: list[Found],
    groups: tuple[int, int],
    lengths: tuple[int, int],
    tile: tuple[int, int],
    gathered: Tensor | None = None,
) -> Layout:
    """One layout from the entries of all groups, each in row order; kind 1 marks partial ones."""
    q_tiles = -(-lengths[0] // tile[0])
    counts = torch.stack([torch.bincount(f.rows, minlength=q_tiles) for f in found])
    ends = counts.reshape(-1).cumsum(0).reshape(*groups, q_tiles)
    starts = (ends.reshape(len(found), -1) - counts)[:, :1].reshape(*groups, -1)
    if not q_tiles:
        starts = torch.zeros(*groups, 1, dtype=torch.int64, device=counts.device)
    table, index = bitset.distinct(torch.cat([f.bits for f in found]))
    kinds = torch.cat([f.kinds for f in found])
    start, used = 0, []
    for f in found:
        mine = index[start : start + len(f.bits)]
        used.append(mine if f.which is None else mine[f.which])
        start += len(f.bits)
    kinds[kinds != FULL] = (torch.cat(used) + 1).int()
    return Layout(
        q_len=lengths[0],
        kv_len=lengths[1],
        q_tile=tile[0],
        kv_tile=tile[1],
        ptr=torch.cat((starts, ends), -1),
        cols=torch.cat([f.cols for f in found]).int(),
        kinds=kinds,
        bits=table,
        gathered=gathered,
    )


class Boxes:
    """Positions cut into tiles: padded element by element, and the range of each tile."""

    def __init__(self, q_pos: Tensor, k_pos: Tensor, tile: tuple[int, int]) -> None:
        self.q, self.q_lo, self.q_hi, self.q_real = _cut(q_pos, tile[0])
        self.k, self.k_lo, self.k_hi, self.k_real = _cut(k_pos, tile[1])

    def of(self, b: int) -> tuple[Tensor, ...]:
        """For one batch entry: q, k (T, tile); q_lo, q_hi, k_lo, k_hi (T,)."""
        i = b if self.q.shape[0] > 1 else 0
        j = b if self.k.shape[0] > 1 else 0
        return self.q[i], self.k[j], self.q_lo[i], self.q_hi[i], self.k_lo[j], self.k_hi[j]


def _cut(pos: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(positions (B, T, tile), smallest, largest (B, T), which slots are real (T, tile)).

    The slots behind the last real one carry on counting: that keeps equal tiles equal.
    """
    length = pos.shape[1]
    tiles = -(-length // tile)
    spare = tiles * tile - length
    if spare:
        more = torch.arange(1, spare + 1, device=pos.device)
        pos = torch.cat((pos, pos[:, -1:] + more), 1)
    cut = pos.reshape(pos.shape[0], tiles, tile)
    real = (torch.arange(tiles * tile, device=pos.device) < length).reshape(tiles, tile)
    big = torch.iinfo(torch.int64).max
    lo = cut.masked_fill(~real, big).amin(-1) if tiles else cut.sum(-1)
    hi = cut.masked_fill(~real, -big).amax(-1) if tiles else cut.sum(-1)
    return cut, lo, hi, real


def _group(mask: Mask | None, boxes: Boxes, b: int, h: int, chosen: Tensor | None) -> Found:
    q, k, q_lo, q_hi, k_lo, k_hi = boxes.of(b)
    rows, cols, full = _visited(mask, q_lo, q_hi, k_lo, k_hi, b, h, chosen)

    def tile(part: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r, c = rows[part], cols[part]
        return q[r], boxes.q_real[r], k[c], boxes.k_real[c]

    sizes = (q.shape[1], k.shape[1])
    unsure = (~full).nonzero()[:, 0]
    alike = None if mask is None else _alike(mask, boxes, rows[unsure], cols[unsure], (b, h))
    if alike is None:
        keep, kinds, bits = evaluate(mask, full, tile, (b, h), sizes)
        return Found(rows[keep], cols[keep], kinds[keep], bits)
    first, like = alike  # one tile speaks for all that look the same
    some, kind, bits = evaluate(
        mask, full[unsure[first]], lambda part: tile(unsure[first[part]]), (b, h), sizes
    )
    kinds = torch.zeros(len(full), dtype=torch.int32, device=full.device)
    keep = full.index_copy(0, unsure, some[like])
    kinds[unsure] = kind[like]
    which = (kind.cumsum(0) - 1)[like]
    return Found(rows[keep], cols[keep], kinds[keep], bits, which[kind[like] > 0])


def _alike(
    mask: Mask, boxes: Boxes, rows: Tensor, cols: Tensor, group: tuple[int, int]
) -> tuple[Tensor, Tensor] | None:
    """(one tile of each look, the look of each tile); None if the mask can't tell."""
    q, k, *_ = boxes.of(group[0])
    if not len(rows) or any(bool((x.diff(dim=-1) != 1).any()) for x in (q, k)):
        return None
    told = mask._alike(q[rows, 0], k[cols, 0], (q.shape[1], k.shape[1]), *group)
    if told is None:
        return None
    key, span = torch.zeros_like(rows), 1
    for x in (*told, boxes.q_real.sum(1)[rows], boxes.k_real.sum(1)[cols]):
        least = int(x.min())
        size = int(x.max()) - least + 1
        span *= size
        if span >= 1 << 62:
            return None
        key = key * size + (x - least)
    kinds, like = torch.unique(key, return_inverse=True)
    first = torch.full((len(kinds),), len(rows), device=rows.device)
    every = torch.arange(len(rows), device=rows.device)
    return first.scatter_reduce(0, like, every, "amin"), like


def evaluate(
    mask: Mask | None,
    full: Tensor,
    tile: Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]],
    group: tuple[int, int],
    sizes: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Look into the tiles that aren't surely full.

    Args:
        mask: what may attend.
        full: (n,) which tiles are surely full.
        tile: for some of the n tiles, (q positions, which are real, k positions, which are real).
        group: the batch entry and head to ask the mask for.
        sizes: (query tile, key tile).

    Returns:
        (which of the n hold anything, kinds (0 full, 1 partial), packed bits of the partial ones).
    """
    kinds = torch.zeros(len(full), dtype=torch.int32, device=full.device)
    keep = torch.ones(len(full), dtype=torch.bool, device=full.device)
    none = torch.zeros((0, sizes[1], sizes[0]), dtype=torch.bool, device=full.device)
    packed = [bitset.pack(none)]
    for part in (~full).nonzero()[:, 0].split(_TILES):
        if mask is None:
            break
        q, q_real, k, k_real = tile(part)
        real = k_real[:, :, None] & q_real[:, None, :]
        seen = mask._element(q[:, None, :], k[:, :, None], *group).expand(real.shape)
        some = (seen & real).flatten(1).any(1)
        partial = ~(seen | ~real).flatten(1).all(1) & some
        keep[part] = some
        kinds[part[partial]] = 1
        packed.append(bitset.pack(seen[partial]))
    return keep, kinds, torch.cat(packed)


def _visited(
    mask: Mask | None,
    q_lo: Tensor,
    q_hi: Tensor,
    k_lo: Tensor,
    k_hi: Tensor,
    b: int,
    h: int,
    chosen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles that may hold something, in row order: (row, column, surely full)."""
    tq, tk = len(q_lo), len(k_lo)
    found = []
    step = max(1, _GRID // max(1, tk))
    for start in range(0, tq, step):
        rows = slice(start, min(start + step, tq))
        count = rows.stop - start
        if mask is None:
            full = torch.ones(count, tk, dtype=torch.bool, device=q_lo.device)
            visit = full
        else:
            none, full = mask._tiles(
                q_lo[rows][:, None], q_hi[rows][:, None], k_lo[None], k_hi[None], b, h
            )
            visit = ~none.expand(count, tk)
            full = full.expand(count, tk)
        if chosen is not None:
            visit = visit & chosen[rows].to(q_lo.device)
        r, c = visit.nonzero(as_tuple=True)
        found.append((r + start, c, full[r, c]))
    if not found:
        none = torch.zeros(0, dtype=torch.int64, device=q_lo.device)
        return none, none, none.bool()
    first, second, third = (torch.cat(x) for x in zip(*found))
    return first, second, third
