"""The heavy part: triangles, sorted diagonal blocks and sinks, as one layout.

Rows are put in sorted order by the layout's own indices, piece after piece; a query of a causal
call stands in one piece of each level of the recursion, and the core op merges its parts by lse.
M_H(piQ(i), piK(j)) = 1 iff floor(i / bq) = floor(j / b)  (HyperAttention, definition of sortLSH).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.methods.hyperattention.recursion import Piece
from foveate.ops import Layout
from foveate.ops.layout import bits as bitset

_TILE = 128


class Order(NamedTuple):
    """Sorted order of an estimated piece: query (B, Hq, n), key (B, Hkv, n_k), from the piece's."""

    query: Tensor
    key: Tensor


def tile_for(block_size: int) -> int:
    """Rows of a tile: a multiple of 8 of which whole ones hold a block with little to spare."""
    each = -(-block_size // -(-block_size // _TILE))
    return -(-each // 8) * 8


def in_tiles(rows: Tensor, block: int, blocks: int, tile: int) -> Tensor:
    """Rows (B, H, n), cut into blocks that begin at a tile each: (B, H, slots), -1 between them."""
    each = -(-block // tile) * tile
    places = torch.arange(rows.shape[-1], device=rows.device)
    slots = places // block * each + places % block
    table = rows.new_full((*rows.shape[:-1], blocks * each), -1)
    table[..., slots] = rows
    return table


def query_slots(piece: Piece, order: Order, tile: int) -> Tensor:
    """(B, Hq, slots) int64 queries of an estimated piece, block by block."""
    return in_tiles(order.query + piece.q0, piece.query_block, piece.blocks, tile)


def heavy_layout(
    pieces: list[Piece],
    orders: list[Order | None],
    lengths: tuple[int, int],
    block_size: int,
    groups: tuple[int, int],
    device: torch.device,
) -> Layout:
    """Everything that is computed exactly.

    Args:
        pieces: of the call.
        orders: of the estimated ones; None for the others.
        lengths: (Lq, Lkv).
        block_size: keys of a diagonal block.
        groups: (B, Hq).
        device: of the orders.
    """
    tile = tile_for(block_size)
    q_parts: list[Tensor] = []
    k_parts: list[Tensor] = []
    rows: list[Tensor] = []
    cols: list[Tensor] = []
    kinds: list[Tensor] = []
    q_tiles = k_tiles = 0

    def span(first: int, last: int) -> Tensor:
        places = torch.arange(first, last, device=device)
        return in_tiles(places[None, None], last - first, 1, tile)

    for piece, order in zip(pieces, orders):
        if order is None:
            q, k = span(piece.q0, piece.q1), span(piece.k0, piece.k1)
            seen = torch.ones(q.shape[-1] // tile, k.shape[-1] // tile, dtype=torch.bool)
            seen = seen.tril() if piece.causal else seen
            r, c = seen.nonzero(as_tuple=True)
            kind = (r == c) & piece.causal
        else:
            q = query_slots(piece, order, tile)
            k = in_tiles(order.key + piece.k0, block_size, piece.blocks, tile)
            k = k.repeat_interleave(groups[1] // k.shape[1], 1)
            tall, wide = (x.shape[-1] // tile // piece.blocks for x in (q, k))
            seen = torch.eye(piece.blocks, dtype=torch.bool)
            seen = seen.repeat_interleave(tall, 0).repeat_interleave(wide, 1)
            if piece.sinks:
                k = torch.cat((k, span(0, piece.sinks).expand(*k.shape[:2], -1)), -1)
                seen = torch.nn.functional.pad(
                    seen, (0, k.shape[-1] // tile - seen.shape[1]), value=True
                )
            r, c = seen.nonzero(as_tuple=True)
            kind = torch.zeros_like(r, dtype=torch.bool)
        q_parts.append(q)
        k_parts.append(k)
        rows.append(r + q_tiles)
        cols.append(c + k_tiles)
        kinds.append(kind)
        q_tiles += q.shape[-1] // tile
        k_tiles += k.shape[-1] // tile

    count = groups[0] * groups[1]
    row = torch.cat(rows).to(device)
    ends = torch.bincount(row, minlength=q_tiles).cumsum(0)
    ptr = (
        torch.nn.functional.pad(ends, (1, 0))
        + len(row) * torch.arange(count, device=device)[:, None]
    )
    causal = torch.ones(1, tile, tile, dtype=torch.bool, device=device).triu()  # [key, row]
    return Layout(
        q_len=lengths[0],
        kv_len=lengths[1],
        q_tile=tile,
        kv_tile=tile,
        ptr=ptr.view(*groups, -1),
        cols=torch.cat(cols).to(device).int().repeat(count),
        kinds=torch.cat(kinds).to(device).int().repeat(count),
        bits=bitset.pack(causal),
        q_index=_joined(q_parts, groups),
        kv_index=_joined(k_parts, groups),
    )


def _joined(parts: list[Tensor], groups: tuple[int, int]) -> Tensor:
    return torch.cat([part.expand(*groups, -1).int() for part in parts], -1)
