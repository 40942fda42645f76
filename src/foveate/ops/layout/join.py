"""Layouts of single heads as one layout of all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
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


def tiled_row(seen: Tensor, tile: int) -> Tensor:
    """What one query sees, as `heads_as_rows` takes it.

    Args:
        seen: bool (B or 1, Lkv).
        tile: keys of a tile, a multiple of 8.

    Returns:
        Float (B or 1, Tk * (tile + 2)), 1.0 for yes: the Tk * tile keys, those beyond the last 0.0;
        then for each tile whether it sees any key of it; then whether all that are real.
    """
    beyond = -seen.shape[1] % tile
    tiles = torch.nn.functional.pad(seen, (0, beyond)).unflatten(1, (-1, tile))
    real = torch.nn.functional.pad(seen, (0, beyond), value=True).view_as(tiles)
    return torch.cat((tiles.flatten(1), tiles.any(2), real.all(2)), 1).float()


def heads_as_rows(
    rows: Sequence[Tensor], owner: tuple[int, ...], group: int, kv_len: int, tile: int
) -> Layout:
    """Decoding's layout where the query heads of a key head are the rows of one tile.

    Each key head is read once, over every tile that one of its heads visits; bits say who sees
    what. It is for queries (B, Hq, 1, D) taken as (B, Hkv, group, D).

    Args:
        rows: what heads may see, as `tiled_row` tells it.
        owner: for each of the Hq query heads the index of its row.
        group: query heads of a key head, a divisor of Hq.
        kv_len: Lkv.
        tile: keys of a tile.
    """
    batches, device = max(len(row) for row in rows), rows[0].device
    powers = torch.tensor(_powers(owner, group, len(rows)), device=device)
    octets, tiles = -(-group // 8), -(-kv_len // tile)
    known = powers @ torch.stack([row.expand(batches, -1) for row in rows], 1)
    known = known.view(batches, len(owner) // group, octets, -1)  # bytes, as floats
    keys, some, every = known.split((tiles * tile, tiles, tiles), 3)
    visited, full = some > 0, every == powers.sum(1).view(-1, octets, 1)
    visited, full = (
        (visited.any(2), full.all(2)) if octets > 1 else (visited[:, :, 0], full[:, :, 0])
    )
    at = visited.flatten().nonzero()[:, 0]
    counts = visited.sum(2)
    ends = counts.flatten().cumsum(0).view_as(counts)
    bits = keys.to(torch.uint8).unflatten(3, (tiles, tile)).permute(0, 1, 3, 4, 2)
    return Layout(
        q_len=group,
        kv_len=kv_len,
        q_tile=8 * octets,
        kv_tile=tile,
        ptr=torch.stack((ends - counts, ends), 2),
        cols=(at % tiles).int(),
        kinds=(at + 1).masked_fill(full.flatten()[at], 0).int(),
        bits=bits.reshape(-1, tile, octets),
    )


@lru_cache(maxsize=1024)
def _powers(owner: tuple[int, ...], group: int, count: int) -> list[list[float]]:
    """(Hkv * octets, count) weights that make bytes of rows.

    Bit r % 8 of byte r // 8 of a key head is its query head r.
    """
    octets = -(-group // 8)
    table = [[0.0] * count for _ in range(len(owner) // group * octets)]
    for head, row in enumerate(owner):
        at = head % group
        table[head // group * octets + at // 8][row] += 2.0 ** (at % 8)
    return table


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
