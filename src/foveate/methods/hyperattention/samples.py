"""The light part: a few sampled keys stand for all that lies outside the blocks.

    z_ij = s q_i . k_{l_j} + log(1 / (m p_{l_j})),   -inf where l_j lies in query i's own block

(HyperAttention, the practical form of algorithms 2 and 3: one sample set for both the denominator
and the values.) Samples are sorted by block, so that a query block's own ones are an interval; a
tile that holds some of them is one of few bit patterns, shared by all blocks, heads and levels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.methods.hyperattention.heavy import Order, query_slots, tile_for
from foveate.methods.hyperattention.recursion import Piece
from foveate.ops import Layout
from foveate.ops.layout import bits as bitset

_NONE = -1


class Draw(NamedTuple):
    """Sampled places among a piece's sorted keys.

    places: (B, Hkv, m) int64. log_weights: log(1 / (m p)) of each, broadcastable to (B, Hkv, m).
    """

    places: Tensor
    log_weights: Tensor


def draw_uniform(shape: torch.Size, count: int, generator: torch.Generator) -> Draw:
    """With replacement, p = 1 / n_k; for shape (B, Hkv, n_k)."""
    size = (*shape[:2], count)
    places = torch.randint(shape[2], size, generator=generator, device=generator.device)
    return Draw(places, torch.full((1, 1, count), math.log(shape[2] / count), dtype=torch.float64))


def draw_by_values(norms: Tensor, count: int, generator: torch.Generator) -> Draw:
    """With replacement, p_j = ||V_j||^2 / ||V||_F^2, for sorted ||V_j||^2 (B, Hkv, n_k)."""
    share = norms.to(generator.device) / norms.sum(-1, keepdim=True).to(generator.device)
    share = torch.where(share.isfinite(), share, 1.0 / share.shape[-1])  # all values are zero
    places = torch.multinomial(share.flatten(0, 1), count, replacement=True, generator=generator)
    places = places.view(*share.shape[:2], count)
    return Draw(places, -(count * share.gather(-1, places)).log())


class Light(NamedTuple):
    """What the core op is given for the light part.

    keys: (B, Hkv, S) index of each sampled key. log_weights: (B or 1, Hkv or 1, S), 0 in places
    that nobody sees. layout: of Lq queries on S sampled keys.
    """

    keys: Tensor
    log_weights: Tensor
    layout: Layout


def light_part(
    pieces: list[Piece],
    orders: list[Order],
    draws: list[Draw],
    queries: int,
    block_size: int,
    heads: int,
) -> Light:
    """The samples of all estimated pieces.

    Args:
        pieces: the estimated ones.
        orders: of each, a sorted order.
        draws: of each, its samples.
        queries: Lq.
        block_size: keys of a diagonal block.
        heads: Hq.
    """
    q_tile, tile = tile_for(block_size), tile_for(max(len(d.places[0, 0]) for d in draws))
    batch, kv_heads = draws[0].places.shape[:2]
    device = orders[0].query.device
    q_parts, keys, weights, kinds, rows, cols = [], [], [], [], [], []
    q_tiles = k_tiles = 0
    for piece, order, draw in zip(pieces, orders, draws):
        places, at = draw.places.to(device).sort(-1)
        weight = draw.log_weights.to(device).expand(batch, kv_heads, -1).gather(-1, at)
        count = places.shape[-1]
        width = -(-count // tile)
        slots = query_slots(piece, order, q_tile)
        tall = slots.shape[-1] // q_tile // piece.blocks
        # Which samples lie in each query block: [low, high).
        bounds = torch.arange(piece.blocks + 1, device=device).expand(batch, kv_heads, -1)
        bounds = torch.searchsorted(places // block_size, bounds.contiguous())
        begin = torch.arange(width, device=device) * tile
        last = (count - begin).clamp_max(tile)  # real samples of each tile
        low = torch.minimum((bounds[..., :-1, None] - begin).clamp_min(0), last)
        high = torch.minimum((bounds[..., 1:, None] - begin).clamp_min(0), last)
        kind = torch.where(high > low, low * (tile + 1) + high, 0)
        kind = kind.masked_fill((low == 0) & (high == last), _NONE)
        kind = kind.repeat_interleave(tall, 2).repeat_interleave(heads // kv_heads, 1)
        b, h, r, c = (kind != _NONE).nonzero(as_tuple=True)
        kinds.append(kind[b, h, r, c])
        rows.append((b * heads + h, r + q_tiles))
        cols.append(c + k_tiles)
        spare = width * tile - count
        keys.append(torch.nn.functional.pad(order.key.gather(-1, places) + piece.k0, (0, spare)))
        weights.append(torch.nn.functional.pad(weight, (0, spare)))
        q_parts.append(slots)
        q_tiles += slots.shape[-1] // q_tile
        k_tiles += width
    group = torch.cat([g for g, _ in rows])
    row = torch.cat([r for _, r in rows])
    cell = group * q_tiles + row
    index = torch.argsort(cell, stable=True)
    counts = torch.bincount(cell, minlength=batch * heads * q_tiles).view(-1, q_tiles)
    ends = counts.flatten().cumsum(0).view_as(counts)
    first = ends[:, :1] - counts[:, :1]
    kind, table = _patterns(torch.cat(kinds)[index], (tile, q_tile))
    layout = Layout(
        q_len=queries,
        kv_len=k_tiles * tile,
        q_tile=q_tile,
        kv_tile=tile,
        ptr=torch.cat((first, ends), 1).view(batch, heads, -1),
        cols=torch.cat(cols)[index].int(),
        kinds=kind,
        bits=table,
        q_index=torch.cat(q_parts, -1).int(),
        kv_index=_without_spare([d.places.shape[-1] for d in draws], tile, device),
    )
    return Light(torch.cat(keys, -1), torch.cat(weights, -1), layout)


def _patterns(intervals: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Kinds and bit tiles (keys, rows) that hide the samples of an interval from all rows.

    An interval is low * (keys + 1) + high; 0 is none.
    """
    named, which = torch.unique(intervals, return_inverse=True)
    hides = named > 0
    low, high = named[hides] // (tile[0] + 1), named[hides] % (tile[0] + 1)
    slots = torch.arange(tile[0], device=intervals.device)
    seen = (slots < low[:, None]) | (slots >= high[:, None])
    number = (hides.cumsum(0) * hides).int()
    return number[which], bitset.pack(seen[..., None].expand(*seen.shape, tile[1]))


def _without_spare(counts: list[int], tile: int, device: torch.device) -> Tensor | None:
    """(1, 1, S) sampled keys, -1 for slots that fill up a piece's last tile; None if none do."""
    if not any(count % tile for count in counts):
        return None
    size = sum(-(-count // tile) * tile for count in counts)
    index = torch.full((1, 1, size), -1, dtype=torch.int32, device=device)
    at = 0
    for count in counts:
        index[..., at : at + count] = torch.arange(at, at + count, dtype=torch.int32, device=device)
        at += -(-count // tile) * tile
    return index
