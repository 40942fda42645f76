"""Which keys each query's window holds, one by one: what unfused and naive forms index by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveate.ops import neighborhood
from foveate.ops.errors import InputError
from foveate.ops.layout.grid import axis_slots
from foveate.ops.masks.axis import Axis


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of tiles of queries; l = prod(window), a tile has t queries, its box b keys.

    Attributes:
        queries: (T, t) token of each query, -1 is none.
        box: (T, b) token of each key that a tile's windows may hold: from the first query's start
            to the last one's end on each axis; keys past the end are repeated, and in no window.
        inside: (T, t, l) int32 place in the box of the keys of a window.
        valid: (T, t, l) which of them are seen; None is all. On causal axes windows are cut.
        offset: (T, t, l) int32 place of each key in a table of prod(2 window - 1) relative
            positions, by key - query + window - 1 on each axis.
    """

    queries: Tensor
    box: Tensor
    inside: Tensor
    valid: Tensor | None
    offset: Tensor


def check(owner: str, q: Tensor, k: Tensor, v: Tensor, mask: neighborhood) -> None:
    """Refuse q (B, Hq, N, D), k (B, Hkv, N, D) and v (B, Hkv, N, Dv) that don't fit together.

    Raises:
        InputError: it names what doesn't.
    """
    if not q.dim() == k.dim() == v.dim() == 4:
        raise InputError(
            f"{owner}: expected q, k and v of 4 axes, (B, heads, tokens, numbers), got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if q.shape[2] != mask.tokens or k.shape[2] != mask.tokens:
        raise InputError(
            f"{owner}: {mask!r} has {mask.tokens} tokens, but there are {q.shape[2]} queries and "
            f"{k.shape[2]} keys."
        )
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise InputError(
            f"{owner}: batch, heads and tokens of k {tuple(k.shape)} and v {tuple(v.shape)} must "
            f"be the same, the batch that of q {tuple(q.shape)}."
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise InputError(f"{owner}: {q.shape[1]} heads aren't a multiple of {k.shape[1]}.")
    if q.shape[3] != k.shape[3]:
        raise InputError(
            f"{owner}: q has {q.shape[3]} numbers in a head and k {k.shape[3]}; expected as many."
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise InputError(
            f"{owner}: q, k and v must have one dtype and device, got {q.dtype} on {q.device}, "
            f"{k.dtype} on {k.device} and {v.dtype} on {v.device}."
        )


@lru_cache(maxsize=4)
def windows(mask: neighborhood, tile: tuple[int, ...]) -> Windows:
    """The windows of a neighborhood, by tiles of queries."""
    queries = box = inside = offset = torch.zeros(1, 1, dtype=torch.int64)
    inside, offset = inside[..., None], offset[..., None]
    real, valid = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, 1, dtype=torch.bool)
    with torch.inference_mode(False):
        for axis, size in zip(mask.axes, tile):
            one = _of_axis(axis, size)
            real = _join(real, one.queries >= 0)
            queries = _join(queries * axis.length, one.queries.clamp_min(0))
            box = _join(box * axis.length, one.box)
            inside = _join3(inside * one.box.shape[1], one.inside)
            offset = _join3(offset * (2 * axis.window - 1), one.offset)
            assert one.valid is not None
            valid = _join3(valid, one.valid)
        all_ = bool(valid[real].all())
        return Windows(
            queries.masked_fill(~real, -1), box, inside.int(), None if all_ else valid, offset.int()
        )


def _of_axis(axis: Axis, size: int) -> Windows:
    slots, residue = axis_slots(axis, size)
    d = axis.dilation
    length = torch.as_tensor(axis.residue_length(residue))[:, None]
    i = torch.minimum(slots[:, :1] // d + torch.arange(size), length - 1)
    start, end = axis.start(i, length), axis.end(i, length)
    first = start[:, :1]
    width = int((end[:, -1:] - first).max())
    width = max(width, int((start - first).max()) + axis.window)
    box = torch.minimum(first + torch.arange(width), length - 1)
    key = start[..., None] + torch.arange(axis.window)
    offset = (key - i[..., None] + axis.window - 1).clamp(0, 2 * axis.window - 2)
    return Windows(
        queries=slots,
        box=residue[:, None] + d * box,
        inside=key - first[..., None],
        valid=key < end[..., None],
        offset=offset,
    )


def _join(one: Tensor, two: Tensor) -> Tensor:
    """Tiles (A, a) and (T, t) of two sets of axes, as those of all: (A T, a t)."""
    one, two = one[:, None, :, None], two[None, :, None]
    both = one & two if one.dtype == torch.bool else one + two
    return both.reshape(one.shape[0] * two.shape[1], -1)


def _join3(one: Tensor, two: Tensor) -> Tensor:
    """The same for each query's window: (A, a, l) and (T, t, m) to (A T, a t, l m)."""
    one, two = one[:, None, :, None, :, None], two[None, :, None, :, None, :]
    both = one & two if one.dtype == torch.bool else one + two
    a, t, b, s, k, m = both.shape
    return both.reshape(a * t, b * s, k * m)
