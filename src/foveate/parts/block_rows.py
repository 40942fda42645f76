"""Each query with blocks of its own choice, as one layout: for each block the rows that chose it.

Blocks of keys are put one behind another, each beginning at a tile; query tiles hold the queries
that chose one block and visit that block's tiles alone. A query stands in as many rows as it chose
blocks, and the core op merges its parts by their lse (MoBA, arXiv 2502.13189, section 2.3). What a
block's queries see of it is everything, but for a causal call's own blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops import Layout
from foveate.ops.layout import bits as bitset

_TILE = 128


@dataclass(frozen=True, eq=False)
class Blocks:
    """Keys cut into blocks; B' is 1 where all batch entries are alike.

    Attributes:
        keys: (B', C, W) index of the key at each place of each block, real ones first; -1 is none.
    """

    keys: Tensor

    @property
    def sizes(self) -> Tensor:
        """(B', C) keys of each block."""
        return (self.keys >= 0).sum(-1)

    def means(self, x: Tensor) -> Tensor:
        """Mean of each block's rows of x (B, H, L, D), 0 of none: (B, H, C, D), fp32 or wider."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        keys = self.keys.expand(len(x), -1, -1)
        there = (keys >= 0)[:, None, :, :, None]
        at = keys.clamp_min(0).flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        rows = x.gather(2, at).unflatten(2, self.keys.shape[1:])
        total = torch.where(there, rows, 0.0).sum(3)
        return total / self.sizes[:, None, :, None].clamp_min(1)

    def owner(self, length: int) -> tuple[Tensor, Tensor]:
        """(block of each key (B', length), its place in it); -1 for keys of no block."""
        batch, count, width = self.keys.shape
        block = self.keys.new_full((batch, length + 1), -1)
        place = block.clone()
        at = torch.where(self.keys >= 0, self.keys, length).flatten(1)
        numbers = torch.arange(count * width, device=at.device).expand(batch, -1)
        block.scatter_(1, at, numbers // width)
        place.scatter_(1, at, numbers % width)
        return block[:, :length], place[:, :length]


def scores_of(q: Tensor, means: Tensor) -> Tensor:
    """Products of queries and block means, in fp32 or wider and without the scale: (B, Hq, Lq, C).

    Args:
        q: (B, Hq, Lq, D).
        means: (B, Hkv, C, D), as `Blocks.means` returns them.
    """
    grouped = q.to(means.dtype).unflatten(1, (means.shape[1], -1))
    return (grouped @ means[:, :, None].mT).flatten(1, 2)


def rows_by_block(
    chosen: Tensor, blocks: Blocks, kv_len: int, own: tuple[Tensor, Tensor] | None = None
) -> Layout:
    """The layout in which each query sees the blocks that it chose.

    Args:
        chosen: bool (B, Hq, Lq, C); without the own blocks of a causal call.
        blocks: of the keys.
        kv_len: Lkv.
        own: for a causal call (own block of each query (B', Lq), its place there): the query sees
            the keys up to its place. Block -1 is a query without one.
    """
    batch, heads, q_len, count = chosen.shape
    device = chosen.device
    width = blocks.keys.shape[2]
    tile = tile_for(width)
    each = -(-width // tile)
    # A causal block is cut alike into rows and keys; otherwise two blocks of rows share keys.
    q_tile = tile if own is not None else _TILE
    groups = batch * heads
    by_block = chosen.transpose(2, 3).reshape(groups * count, q_len)
    counts = by_block.sum(1)
    tiles = (-(-counts // q_tile)).view(groups, count)
    first = tiles.cumsum(1) - tiles
    ahead = 0 if own is None else count * each
    height = ahead + (int(tiles.sum(1).max()) if groups else 0)
    index = torch.full((groups, height * q_tile), -1, device=device)
    cell, query = by_block.nonzero(as_tuple=True)
    rank = torch.arange(len(cell), device=device) - (counts.cumsum(0) - counts)[cell]
    first = first.reshape(-1) + ahead
    index[cell // count, first[cell] * q_tile + rank] = query

    wide = (-(-blocks.sizes // tile)).expand(batch, -1)
    wide = wide.repeat_interleave(heads, 0).reshape(-1)
    visits = tiles.reshape(-1) * wide
    at = torch.repeat_interleave(torch.arange(groups * count, device=device), visits)
    number = torch.arange(len(at), device=device) - (visits.cumsum(0) - visits)[at]
    rows = first[at] + number // wide[at]
    cols = at % count * each + number % wide[at]
    cells, kinds = at // count * height + rows, torch.zeros_like(rows)
    bits = torch.zeros(0, tile, q_tile // 8, dtype=torch.uint8, device=device)
    if own is not None:
        slots, entries, col, kind = _own_rows(own, count, each, tile, blocks, batch)
        index[:, : ahead * tile] = slots.repeat_interleave(heads, 0)
        which, row = entries
        steps = torch.arange(heads, device=device)
        group = (which[:, None] * heads + steps).reshape(-1)
        cells = torch.cat((cells, group * height + row.repeat_interleave(heads)))
        cols = torch.cat((cols, col.repeat_interleave(heads)))
        kinds = torch.cat((kinds, kind.repeat_interleave(heads)))
        order = torch.argsort(cells, stable=True)
        cells, cols, kinds = cells[order], cols[order], kinds[order]
        bits = bitset.pack(torch.ones(1, tile, tile, dtype=torch.bool, device=device).triu())
    ends = torch.bincount(cells, minlength=groups * height).cumsum(0).view(groups, height)
    starts = torch.cat((ends.new_zeros(1), ends[:-1, -1])) if height and groups else ends.sum(1)
    return Layout(
        q_len=q_len,
        kv_len=kv_len,
        q_tile=q_tile,
        kv_tile=tile,
        ptr=torch.cat((starts[:, None], ends), 1).view(batch, heads, -1),
        cols=cols.int(),
        kinds=kinds.int(),
        bits=bits,
        q_index=index.view(batch, heads, -1).int(),
        kv_index=_filled(blocks.keys, each * tile).flatten(1)[:, None].int(),
    )


def tile_for(width: int) -> int:
    """Keys of a tile: a multiple of 8, whole ones of which hold a block with little to spare."""
    each = -(-width // -(-width // _TILE))
    return -(-each // 8) * 8


def _filled(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1)


def _own_rows(
    own: tuple[Tensor, Tensor], count: int, each: int, tile: int, blocks: Blocks, batch: int
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """Queries in their own blocks, at their own places.

    Returns:
        (query at each slot (B, C * each * tile), -1 is none; (batch entry, row tile), column and
        kind of each visit).
    """
    block, place = (x.expand(batch, -1) for x in own)
    size = count * each * tile
    slots = block.new_full((batch, size + 1), -1)
    at = torch.where(block >= 0, block * each * tile + place, size)
    queries = torch.arange(block.shape[1], device=block.device).expand(batch, -1)
    slots = slots.scatter(1, at, queries)[:, :size]
    tall = (slots >= 0).view(batch, count, each, tile).any(-1)
    lower = torch.ones(each, each, dtype=torch.bool, device=block.device).tril()
    b, c, i, j = (tall[..., None] & lower).nonzero(as_tuple=True)
    return slots, (b, c * each + i), c * each + j, (i == j).long()
