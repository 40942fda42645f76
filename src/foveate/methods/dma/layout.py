"""From keep sets to what the engine visits, and what that counts up to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.methods.dma.keep import ends, smoothed
from foveate.ops import Layout
from foveate.parts.lifetimes import layout_of_lifetimes, layout_of_spans


class Kept(NamedTuple):
    """Who sees which key, by index of key and query; all (B, G, Lkv).

    first, last: key j is seen by queries first_j ... last_j - 1; own: beside that, with block
    smoothing, whether query t sees the keys own_from_t ... t of its own block. None without it.
    """

    first: Tensor
    last: Tensor
    own: Tensor | None = None
    own_from: Tensor | None = None


def kept(rank: Tensor, window: int, relu: Tensor | None, smooth: int, start: int) -> Kept:
    """The keep sets of the queries from index `start` on.

    Args:
        rank: (B, G, L), the order of the keys; -inf is padding.
        window: w.
        relu: (B, G, L) bool, keys to keep in place of the w best; or None.
        smooth: keys of a block for block smoothing; 0 is none.
        start: index of the first query among the keys.
    """
    length = rank.shape[2]
    index = torch.arange(length, device=rank.device).expand_as(rank)
    real = rank > -torch.inf
    last = ends(rank, window, start) if relu is None else (relu & real) * length
    if not smooth:
        return Kept(index, last)
    first = real.int().argmax(-1)
    last, own = smoothed(last, smooth, first)
    at = first[..., None]
    begin = at + (index - at).clamp_min(0) // smooth * smooth
    return Kept(begin + smooth, last * real, own & real, begin)


def tile_for(window: int) -> int:
    """Rows of a tile: the more, the fewer lists, each longer than `window` by that many keys."""
    return 64 if window < 512 else 128


def layouts(found: Kept, q_len: int, tile: int = 64, *, gather: bool = True) -> list[Layout]:
    """Disjoint parts: the keys that live for a while, and with smoothing each query's own block."""
    shift = found.first.shape[2] - q_len
    parts = [
        layout_of_lifetimes(found.first - shift, found.last - shift, q_len, tile, gather=gather)
    ]
    if found.own is not None and found.own_from is not None:
        at = torch.arange(shift, shift + q_len, device=found.own.device)
        before = (max(0, -shift), 0)  # queries before the first key, which have no block
        low = pad(found.own_from[..., max(0, shift) :], before)
        high = torch.where(pad(found.own[..., max(0, shift) :], before), at + 1, low)
        parts.append(layout_of_spans(low, high, found.first.shape[2], tile))
    return parts


def active_tiles(found: Kept, q_len: int, tile: int = 64) -> tuple[int, int]:
    """(active, all) tiles of tile x tile, all groups together: active if any pair in it attends.

    What a kernel visits that skips whole tiles only. `all` are those that hold a key that isn't
    later than a query.
    """
    kv_len = found.first.shape[2]
    cells = []
    for part in layouts(found, q_len, tile, gather=False):
        cells.append(part.entry_rows * part.kv_tiles + part.cols)
    rows = torch.arange(-(-q_len // tile))
    last = ((rows + 1) * tile).clamp_max(q_len) + kv_len - q_len
    groups = found.first.shape[0] * found.first.shape[1]
    return len(torch.cat(cells).unique()), int((-(-last // tile)).sum()) * groups
