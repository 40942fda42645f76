"""Layouts of single heads as one layout of all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.layout.core import Layout


def plain(layout: Layout) -> bool:
    """Whether tiles and bits are all that a layout has, the same for all heads."""
    tables = (
        layout.gathered, layout.q_index, layout.kv_index, layout.key_range, layout.row_range,
    )  # fmt: skip
    return layout.groups[1] == 1 and all(table is None for table in tables)


def by_heads(layouts: Sequence[Layout], owner: Sequence[int]) -> Layout:
    """One layout in which head h sees what `layouts[owner[h]]` says.

    Args:
        layouts: plain ones, for the same lengths and tiles.
        owner: for each head the index of its layout.

    Raises:
        InputError: a layout that isn't plain, or other lengths, tiles or batch entries than the
            first's.
    """
    sizes = {(x.q_len, x.kv_len, x.q_tile, x.kv_tile) for x in layouts}
    batches = max((x.groups[0] for x in layouts), default=0)
    if len(sizes) != 1 or not all(plain(x) for x in layouts):
        raise InputError("by_heads: expected layouts of tiles and bits alone, of the same sizes.")
    if any(x.groups[0] not in (1, batches) for x in layouts):
        raise InputError(f"by_heads: expected lists for 1 or {batches} batch entries.")
    first, patterns, kinds = layouts[0], 0, []
    for one in layouts:
        told = patterns and one.bits.shape[0]
        kinds.append(
            torch.where(one.kinds > 0, one.kinds + patterns, one.kinds) if told else one.kinds
        )
        patterns += one.bits.shape[0]
    if batches == 1:  # whole lists one after another
        begin = [0, *accumulate(layouts[i].cols.numel() for i in owner)]
        table = torch.cat([one.ptr[0] for one in layouts])
        at, begins = torch.tensor((tuple(owner), begin[:-1]), device=first.device).unbind()
        ptr = (table[at] + begins[:, None])[None]
        cols = torch.cat([layouts[i].cols for i in owner])
        kind = torch.cat([kinds[i] for i in owner])
    else:
        ptr, at = _rearranged(layouts, owner, batches)
        cols, kind = torch.cat([x.cols for x in layouts])[at], torch.cat(kinds)[at]
    return Layout(
        first.q_len, first.kv_len, first.q_tile, first.kv_tile, ptr, cols, kind,
        torch.cat([x.bits for x in layouts]),
    )  # fmt: skip


def _rearranged(
    layouts: Sequence[Layout], owner: Sequence[int], batches: int
) -> tuple[Tensor, Tensor]:
    """(ptr of all heads, (nnz,) where each of their entries stands among those of all layouts)."""
    ptrs, entries = [], 0
    for one in layouts:
        ptrs.append((one.ptr[:, 0] + entries).expand(batches, -1))
        entries += one.cols.numel()
    ptr = torch.stack(ptrs, 1)[:, list(owner)]  # (batches, heads, tiles + 1)
    start, count = ptr[..., 0].reshape(-1), (ptr[..., -1] - ptr[..., 0]).reshape(-1)
    before = count.cumsum(0) - count
    at = torch.repeat_interleave(start - before, count)
    at = at + torch.arange(at.numel(), device=ptr.device)
    return ptr + (before - start).reshape(ptr.shape[:2])[..., None], at
