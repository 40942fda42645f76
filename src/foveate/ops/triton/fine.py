"""A layout's lists over smaller tiles, those that a kernel takes at once, where that drops some.

A tile in part seen often has corners that nobody sees, and others that all of it sees: at the edges
of windows, of documents, along the diagonal. Cut to the size of a kernel's blocks, the first are
never visited and the second need no mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.layout import FULL, Layout
from foveate.ops.layout import bits as bitset

_MOST = 1 << 24  # entries of the finer lists, before any are dropped
_BYTES = 1 << 22  # of bits that are counted at a time
_WORTH = 0.97  # of the visited area: with more left, lists stay as they are


class _Cut(NamedTuple):
    """What each entry becomes: (nnz, rows, columns) kinds, -1 where nothing is seen; their bits."""

    kinds: Tensor
    bits: Tensor


def finer(layout: Layout, rows: int, keys: int) -> Layout | None:
    """The layout over tiles of at most `rows` x `keys`; None if nothing is gained.

    Only layouts of bit tiles alone; waits for the device.
    """
    tables = (
        layout.q_index, layout.kv_index, layout.gathered, layout.key_range, layout.row_range,
    )  # fmt: skip
    if any(table is not None for table in tables) or not layout.bits.shape[0]:
        return None
    rows, keys = min(rows, layout.q_tile), min(keys, layout.kv_tile)
    if layout.q_tile % rows or layout.kv_tile % keys or rows % 8:
        return None
    down, across = layout.q_tile // rows, layout.kv_tile // keys
    if down * across == 1 or layout.cols.numel() * down * across > _MOST:
        return None
    if int((layout.kinds == FULL).sum()) > _WORTH * layout.cols.numel():
        return None  # only tiles in part seen can be dropped
    cut = _cut(layout, rows, keys)
    below, beside = (torch.arange(n, device=layout.device) for n in (down, across))
    tile = layout.entry_rows % layout.q_tiles
    row = tile[:, None, None] * down + below[:, None]
    col = layout.cols.long()[:, None, None] * across + beside
    there = (cut.kinds >= 0) & (row * rows < layout.q_rows) & (col * keys < layout.kv_rows)
    left = int(there.sum())
    if left > _WORTH * there.numel():
        return None
    tiles = -(-layout.q_rows // rows)
    groups = layout.groups[0] * layout.groups[1]
    owner = (layout.entry_rows // layout.q_tiles)[:, None, None] * tiles + row
    owner, col = (x.expand(there.shape)[there] for x in (owner, col))
    order = torch.argsort(owner, stable=True)
    ends = torch.bincount(owner, minlength=groups * tiles).cumsum(0).reshape(*layout.groups, tiles)
    starts = torch.cat((ends.new_zeros(1), ends.reshape(-1)[:-1])).reshape(ends.shape)[..., :1]
    return Layout(
        layout.q_len, layout.kv_len, rows, keys, torch.cat((starts, ends), -1), col[order].int(),
        cut.kinds[there][order].int(), cut.bits,
    )  # fmt: skip


def _cut(layout: Layout, rows: int, keys: int) -> _Cut:
    down, across = layout.q_tile // rows, layout.kv_tile // keys
    parts = layout.bits.unflatten(1, (across, keys)).unflatten(3, (down, rows // 8))
    parts = parts.permute(0, 3, 1, 2, 4).flatten(0, 2).contiguous()
    chunk = max(1, _BYTES // (keys * rows // 8))
    count = torch.cat([bitset.count(part) for part in parts.split(chunk)])
    some = (count > 0) & (count < rows * keys)
    kinds = torch.where(some, some.cumsum(0), FULL).masked_fill(count == 0, -1)
    whole = kinds.new_full((1, down, across), FULL)
    table = torch.cat((whole, kinds.reshape(-1, down, across)))
    return _Cut(table[layout.kinds.long()], parts[some])
