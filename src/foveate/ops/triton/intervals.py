"""Bit tiles that say no more than a range for each row (or each key), told as ranges.

Most masks let a row see one run of keys: causal ones, windows, documents. A kernel that owns rows
then holds two numbers for each of them instead of loading the bits of every tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.layout import bits as bitset

_CHUNK = 256  # bit tiles unpacked at a time
_LINES = 1 << 22  # lines of partial tiles taken at a time
_MOST = 1 << 27  # lines of partial tiles, all together, for which this is still worth its time


def intervals(
    bits: Tensor, q_tile: int, by_key: bool, owner: Tensor, other: Tensor, kinds: Tensor,
    sizes: int, length: int,
) -> Tensor | None:  # fmt: skip
    """The range of the other side that each line of the owned side sees.

    Args:
        bits: (n, kv_tile, q_tile / 8), of a layout.
        q_tile: rows of a tile.
        by_key: whether the owned lines are keys, the other side rows.
        owner: (nnz,) tile of the owned side, counted through all groups.
        other: (nnz,) tile of the other side.
        kinds: (nnz,) kinds of the layout, none of them a range.
        sizes: tiles of the owned side in all groups.
        length: lines of the owned side in each; what bits say of lines past it is anything.

    Returns:
        (tiles, lines of a tile, 2) int32, first and end; None if some line sees no single run in
        the tiles that its list visits, or if keys between those runs are in none of them.
    """
    partial = kinds > 0
    owned, side = (bits.shape[1], q_tile) if by_key else (q_tile, bits.shape[1])
    if not bits.shape[0] or int(partial.sum()) * owned > _MOST:
        return None
    spans = _spans(bits, q_tile, by_key)
    if spans is None:
        return None
    far = torch.iinfo(torch.int32).max
    whole, of = other[~partial].long() * side, owner[~partial]
    low = torch.full((sizes,), far, dtype=torch.int64, device=bits.device)
    high = torch.zeros_like(low)
    low.scatter_reduce_(0, of, whole, "amin")
    high.scatter_reduce_(0, of, whole + side, "amax")
    lows = low[:, None].repeat(1, owned)
    highs = high[:, None].repeat(1, owned)
    parts = partial.nonzero()[:, 0].split(max(1, _LINES // owned))
    place = torch.arange(owned, device=bits.device)
    tiles = -(-length // owned)
    for part in parts:
        at, start, first, end = _lines(part, spans, owner, other, kinds, side)
        some = first < end
        lows.scatter_reduce_(0, at, (start + first).masked_fill(~some, far), "amin")
        highs.scatter_reduce_(0, at, (start + end).masked_fill(~some, 0), "amax")
    wrong = torch.zeros((), dtype=torch.bool, device=bits.device)
    for part in parts:
        at, start, first, end = _lines(part, spans, owner, other, kinds, side)
        mine, until = ((x.gather(0, at) - start).clamp(0, side) for x in (lows, highs))
        same = (mine == first) & (until == end)
        there = owner[part][:, None] % tiles * owned + place < length
        wrong |= (there & ~torch.where(first < end, same, mine >= until)).any()
    past = torch.arange(sizes, device=bits.device)[:, None] % tiles * owned + place >= length
    lows, highs = lows.masked_fill(past, far), highs.masked_fill(past, 0)
    if not by_key:
        wrong |= _hole(lows, highs, far)
    if bool(wrong):
        return None
    lows = torch.minimum(lows, highs)
    return torch.stack((lows, highs), -1).int()


def _lines(
    part: Tensor, spans: tuple[Tensor, Tensor], owner: Tensor, other: Tensor, kinds: Tensor,
    side: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of partial tiles: (n, lines) owner; (n, 1) where the other side begins; first, end there."""
    first, end = (x[kinds[part].long() - 1] for x in spans)
    return owner[part][:, None].expand_as(first), other[part].long()[:, None] * side, first, end


def _hole(lows: Tensor, highs: Tensor, far: int) -> Tensor:
    """Whether between the ranges of a tile's lines lies what is in none of them.

    Kernels load all from the first range of a tile to the last; a key that nobody sees may hold
    NaN, and the bits say which ones those are.
    """
    first, order = lows.sort(1)
    until = highs.gather(1, order).cummax(1).values
    return ((first[:, 1:] > until[:, :-1]) & (first[:, 1:] < far)).any()


def _spans(bits: Tensor, q_tile: int, by_key: bool) -> tuple[Tensor, Tensor] | None:
    """(first, end) of the run of each line of each bit tile, (n, lines); None if one has gaps."""
    found = []
    for part in bits.split(_CHUNK):
        seen = bitset.unpack(part, q_tile)
        seen = seen.mT if by_key else seen
        count = seen.sum(-1)
        first = seen.int().argmax(-1)
        last = seen.shape[-1] - 1 - seen.flip(-1).int().argmax(-1)
        if not bool(((count == 0) | (last - first + 1 == count)).all()):
            return None
        found.append((first.int(), (first + count).int()))
    return tuple(torch.cat(x) for x in zip(*found))  # type: ignore[return-value]
