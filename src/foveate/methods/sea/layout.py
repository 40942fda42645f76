"""From kept bins to a layout: a tile of queries lists the keys that any of its rows keeps.

Neighbouring rows read nearly the same bins, and row t + 1 reads each bin a little further on, so
what a tile's rows keep are a few intervals, at most one for each bin. Making the lists therefore
costs as much as the lists are long, not L^2; bits then say which row sees which key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.methods.sea.compress import EPS, firsts
from foveate.ops import Layout
from foveate.ops.layout import bits as bitset

ROWS, KEYS = 8, 64
_PART = 4096  # lists whose bits are made in one go


@dataclass(frozen=True)
class Stretch:
    """How compressed rows are read at full width.

    Attributes:
        seen: (B, L) keys that each row sees, at least 1 for real rows.
        shift: (B,) index of each sequence's first key.
        kv_len: keys in all.
        jitter: (kv_len,) added to each key's place, or None.
        thin: of the kept keys only each `thin`-th place is visited.
    """

    seen: Tensor
    shift: Tensor
    kv_len: int
    jitter: Tensor | None = None
    thin: int = 1


def layout_of(keep: Tensor, how: Stretch) -> Layout:
    """The layout of kept bins, bool (B, H, L, K)."""
    batch, heads, length, width = keep.shape
    tiles = -(-length // ROWS)
    spare = tiles * ROWS - length
    seen = F.pad(how.seen.expand(batch, -1), (0, spare), value=0).view(batch, tiles, ROWS)
    some = F.pad(keep, (0, 0, 0, spare)).view(batch, heads, tiles, ROWS, width).any(3)

    # What tile rows read of bin m: from where the row that sees least has it to the one that most.
    least = seen.masked_fill(seen <= 0, torch.iinfo(torch.int64).max).amin(2)
    most = seen.amax(2)
    start = firsts(least.clamp_max(how.kv_len).clamp_min(1), width)[..., :-1]
    stop = firsts(most.clamp_min(1), width)[..., 1:]
    if how.jitter is not None:
        start = (start - 1).clamp_min(0)
        stop = torch.minimum(stop + 1, most[..., None])
    start, stop = (x[:, None].expand_as(some) for x in (start, stop))
    before = F.pad(stop.masked_fill(~some, 0).cummax(-1).values[..., :-1], (1, 0))
    start = torch.maximum(start, before)
    counts = (stop - start).clamp_min(0) * some

    keys, cell = _expanded(start.flatten(0, 2), counts.flatten(0, 2))
    if how.thin > 1:
        at = keys % how.thin == 0
        keys, cell = keys[at], cell[at]
    listed, cells = _lists(keys, cell, batch * heads * tiles)
    bits = torch.cat(
        [
            bitset.pack(_seen(a, c, keep, how, tiles))
            for a, c in zip(listed.split(_PART), cells.split(_PART))
        ]
        or [torch.zeros(0, KEYS, ROWS // 8, dtype=torch.uint8, device=keep.device)]
    )
    ends = torch.bincount(cells, minlength=batch * heads * tiles).cumsum(0)
    ends = ends.view(batch, heads, tiles)
    first = F.pad(ends.flatten()[:-1], (1, 0)).view(batch, heads, tiles)[..., :1]
    at = how.shift[cells // (heads * tiles)][:, None]
    gathered = torch.where(listed >= 0, listed + at, -1)
    numbers = torch.arange(len(listed), device=keep.device)
    return Layout(
        q_len=length,
        kv_len=how.kv_len,
        q_tile=ROWS,
        kv_tile=KEYS,
        ptr=torch.cat((first, ends), -1),
        cols=(-(-how.kv_len // KEYS) + numbers).int(),
        kinds=(numbers + 1).int(),
        bits=bits,
        gathered=gathered.int() if len(gathered) else None,
    )


def _expanded(start: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The members of intervals start ... start + count - 1, and the cell (row) of each."""
    cell, bin_ = counts.nonzero(as_tuple=True)
    n, first = counts[cell, bin_], start[cell, bin_]
    stops = n.cumsum(0)
    total = int(stops[-1]) if len(stops) else 0
    which = torch.repeat_interleave(
        torch.arange(len(n), device=n.device), n, output_size=total
    )  # fmt: skip
    within = torch.arange(total, device=n.device) - (stops - n)[which]
    return first[which] + within, cell[which]


def _lists(keys: Tensor, cell: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Keys, in order of cells, as lists (M, KEYS), -1 is none; and the cell of each list."""
    counts = torch.bincount(cell, minlength=cells)
    lists = -(-counts // KEYS)
    skipped = (lists.cumsum(0) - lists) * KEYS - (counts.cumsum(0) - counts)
    listed = keys.new_full((int(lists.sum()) * KEYS,), -1)
    listed[torch.arange(len(keys), device=keys.device) + skipped[cell]] = keys
    names = torch.arange(cells, device=keys.device)
    return listed.view(-1, KEYS), torch.repeat_interleave(names, lists)


def _seen(listed: Tensor, cells: Tensor, keep: Tensor, how: Stretch, tiles: int) -> Tensor:
    """(M, KEYS, ROWS) bool: which row of the tile keeps which key of a list.

    A list's element is one multiplication, one look-up and one comparison; see `compress.bins_of`.
    """
    batch, heads, length, width = keep.shape
    b, h, tile = cells // (heads * tiles), cells // tiles % heads, cells % tiles
    row = tile[:, None] * ROWS + torch.arange(ROWS, device=keep.device)
    at = row.clamp_max(length - 1)
    seen = how.seen.expand(batch, -1)[b[:, None], at].masked_fill(row >= length, 0)
    scale = width / seen.clamp_min(1).double()
    place = listed.double() + 0.5
    if how.jitter is not None:
        place = place + how.jitter[listed.clamp_min(0)]
    index = (place[:, :, None] * scale[:, None]).sub_(EPS).long().clamp_(0, width - 1)
    index += (((b * heads + h)[:, None] * length + at) * width)[:, None]
    found = keep.reshape(-1).take(index)
    nowhere = torch.iinfo(torch.int64).max
    return found & (listed.masked_fill(listed < 0, nowhere)[:, :, None] < seen[:, None])
