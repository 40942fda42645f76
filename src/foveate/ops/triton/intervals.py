"""Bit tiles that say no more than a range for each row (or each key), told as ranges.

Most masks let a row see one run of keys: causal ones, windows, documents. A kernel that owns rows
then holds two numbers for each of them instead of loading the bits of every tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.layout import bits as bitset

_CHUNK = 256  # bit tiles unpacked at a time
_MOST = 1 << 27  # lines of partial tiles, all together, for which this is still worth its time


def intervals(
    bits: Tensor, q_tile: int, by_key: bool, owner: Tensor, other: Tensor, kinds: Tensor, sizes: int
) -> Tensor | None:
    """The range of the other side that each line of the owned side sees.

    Args:
        bits: (n, kv_tile, q_tile / 8), of a layout.
        q_tile: rows of a tile.
        by_key: whether the owned lines are keys, the other side rows.
        owner: (nnz,) tile of the owned side, counted through all groups.
        other: (nnz,) tile of the other side.
        kinds: (nnz,) kinds of the layout, none of them a range.
        sizes: tiles of the owned side in all groups.

    Returns:
        (tiles, lines of a tile, 2) int32, first and end; None if some line sees no single run in
        the tiles that its list visits.
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
    start = other[partial].long()[:, None] * side
    first, end = (x[kinds[partial].long() - 1] for x in spans)
    at = owner[partial][:, None].expand_as(first)
    some = first < end
    lows = low[:, None].repeat(1, owned)
    highs = high[:, None].repeat(1, owned)
    lows.scatter_reduce_(0, at, (start + first).masked_fill(~some, far), "amin")
    highs.scatter_reduce_(0, at, (start + end).masked_fill(~some, 0), "amax")
    mine, until = (
        (x.gather(0, at) - start).clamp(0, side) for x in (lows, highs)
    )  # fmt: skip
    right = torch.where(some, (mine == first) & (until == end), mine >= until)
    if not bool(right.all()):
        return None
    lows = torch.minimum(lows, highs)
    return torch.stack((lows, highs), -1).int()


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
        found.append((first, first + count))
    return tuple(torch.cat(x) for x in zip(*found))  # type: ignore[return-value]
