"""From parts to a layout: whole columns gathered side by side, the rest tile by tile.

Rows of a part stand together (permuted), so do its columns; causality is asked of original
positions. A query that stands in several parts, with keys of its own in each, is merged by lse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.methods.mminference.distances import Distances
from foveate.methods.mminference.problem import Part, Problem
from foveate.ops import Layout, Mask
from foveate.ops.layout import bits as bitset

_CHUNK = 512


class _Group:
    """The lists of one (batch entry, head), as they grow."""

    def __init__(self, tile: int, device: torch.device) -> None:
        self.tile = tile
        none = torch.zeros(0, dtype=torch.int64, device=device)
        self.q_index, self.k_index = [none], [none]
        self.rows, self.cols, self.kinds = [none], [none], [none]
        self.bits = [torch.zeros(0, tile, tile // 8, dtype=torch.uint8, device=device)]
        self.q_tiles = self.k_tiles = self.patterns = 0

    def add(self, problem: Problem, part: Part) -> None:
        """One more part."""
        if not len(part.rows) or not len(part.keys):
            return
        tile = self.tile
        columns = part.columns
        some = torch.zeros_like(part.keys, dtype=torch.bool) if columns is None else columns
        q, q_real = _cut(part.rows, tile)
        picked, p_real = _cut(part.keys[some], tile)
        k, k_real = _cut(part.keys, tile)
        self.q_index.append(torch.where(q_real, problem.rows[q], -1).flatten())
        for at, real in ((picked, p_real), (k, k_real)):
            self.k_index.append(torch.where(real, problem.keys[at], -1).flatten())
        q_at = problem.q_at[q]
        self._tiles(q_at, q_real, problem.k_at[picked], p_real, None, None)
        self.k_tiles += len(picked)
        if part.band is not None:
            kept = _cut(~some, tile)[0] & k_real if columns is not None else k_real
            numbers = None
            if part.numbers is not None:
                numbers = (_cut(part.numbers[0], tile)[0], _cut(part.numbers[1], tile)[0])
            self._tiles(q_at, q_real, problem.k_at[k], k_real, (part, kept), numbers)
        self.k_tiles += len(k)
        self.q_tiles += len(q)

    def _tiles(
        self,
        q_at: Tensor,
        q_real: Tensor,
        k_at: Tensor,
        k_real: Tensor,
        band: tuple[Part, Tensor] | None,
        numbers: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Entries of row tiles (R, tile) on key tiles (C, tile); without a band all keys count."""
        if not len(k_at):
            return
        none = k_at.amin(1) > q_at.amax(1)[:, None]
        full = k_at.amax(1) <= q_at.amin(1)[:, None]
        q_u, k_u = (q_at, k_at) if numbers is None else numbers
        kept = k_real
        mask = None
        if band is not None:
            mask, kept = band[0].band, band[1]
            assert mask is not None
            sure = mask._tiles(
                q_u.amin(1)[:, None], q_u.amax(1)[:, None], k_u.amin(1), k_u.amax(1), 0, 0
            )
            none = none | sure.none | ~kept.any(1)
            full = full & sure.full & (kept == k_real).all(1)
        rows, cols = (~none).nonzero(as_tuple=True)
        kinds = torch.zeros_like(rows)
        q_bits = _bytes(q_real)  # (R, tile / 8), rows of a tile as bits
        k_bits, kept_bits = (x.to(torch.uint8)[..., None] * 255 for x in (k_real, kept))
        for at in (~full[rows, cols]).nonzero()[:, 0].split(_CHUNK):
            r, c = rows[at], cols[at]
            rows_of = q_bits[r][:, None]
            seen = seen_of(q_at, k_at, q_u, k_u, mask, r, c) & rows_of & kept_bits[c]
            real = rows_of & k_bits[c]
            some, every = (x.flatten(1) for x in (seen != 0, seen == real))
            some, every = some.any(1), every.all(1)
            partial = some & ~every
            kinds[at] = torch.where(
                partial, partial.cumsum(0) + self.patterns, torch.where(some, 0, -1)
            )
            self.bits.append(seen[partial])
            self.patterns += int(partial.sum())
        keep = kinds >= 0
        self.rows.append(rows[keep] + self.q_tiles)
        self.cols.append(cols[keep] + self.k_tiles)
        self.kinds.append(kinds[keep])


def seen_of(
    q_at: Tensor,
    k_at: Tensor,
    q_u: Tensor,
    k_u: Tensor,
    mask: Mask | None,
    r: Tensor,
    c: Tensor,
) -> Tensor:
    """Causality and a mask in the tiles (r, c), packed: uint8 (n, keys, rows / 8).

    Where only distances count, and the rows and the keys of a tile stand in a row, as most do, all
    tiles of one distance between their first ones are the same, and made once.
    """
    if mask is None or isinstance(mask, Distances):
        apart = q_at[r, 0] - k_at[c, 0]
        steady = (q_at.diff(dim=1) == 1).all(1)[r] & (k_at.diff(dim=1) == 1).all(1)[c]
        kinds, which = apart[steady].unique(return_inverse=True)
        if len(kinds) * 2 < len(r):
            steps = torch.arange(q_at.shape[1], device=q_at.device)
            distance = kinds[:, None, None] + (steps[None, :] - steps[:, None])
            alike = bitset.pack(distance >= 0 if mask is None else mask.at(distance))
            seen = alike.new_empty(len(r), *alike.shape[1:])
            seen[steady] = alike[which]
            rest = (~steady).nonzero()[:, 0]
            seen[rest] = _each(q_at, k_at, q_u, k_u, mask, r[rest], c[rest])
            return seen
    return _each(q_at, k_at, q_u, k_u, mask, r, c)


def _each(
    q_at: Tensor,
    k_at: Tensor,
    q_u: Tensor,
    k_u: Tensor,
    mask: Mask | None,
    r: Tensor,
    c: Tensor,
) -> Tensor:
    seen = k_at[c][:, :, None] <= q_at[r][:, None, :]
    if mask is not None:
        seen = seen & mask._element(q_u[r][:, None, :], k_u[c][:, :, None], 0, 0)
    return bitset.pack(seen)


def _bytes(x: Tensor) -> Tensor:
    """Bool (n, tile) as bits: uint8 (n, tile / 8)."""
    return bitset.pack(x[:, None])[:, 0]


def _cut(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """X (n,) as (tiles, tile), the last value repeated to the end, and which slots are real."""
    count = -(-len(x) // tile)
    if not count:
        return x.new_zeros(0, tile), torch.zeros(0, tile, dtype=torch.bool, device=x.device)
    at = torch.arange(count * tile, device=x.device).view(count, tile)
    return x[at.clamp_max(len(x) - 1)], at < len(x)


def layout_of_parts(
    parts: list[list[tuple[Problem, list[list[Part]]]]],
    lengths: tuple[int, int],
    tile: int,
    device: torch.device,
) -> Layout:
    """The layout of all sequences.

    Args:
        parts: per sequence, its problems and of each, per query head, its parts. The key sets in
            which a query stands must be disjoint.
        lengths: (Lq, Lkv).
        tile: rows and keys of a tile.
        device: of the lists.
    """
    groups = []
    for sequence in parts:
        for h in range(len(sequence[0][1])):
            group = _Group(tile, device)
            for problem, by_head in sequence:
                for part in by_head[h]:
                    group.add(problem, part)
            groups.append(group)
    heads = len(parts[0][0][1])
    q_tiles = max(1, *(g.q_tiles for g in groups))
    k_tiles = max(1, *(g.k_tiles for g in groups))
    table, which = bitset.distinct(torch.cat([b for g in groups for b in g.bits]))
    which = torch.nn.functional.pad(which + 1, (1, 0))
    counts, cols, kinds, before = [], [], [], 0
    for group in groups:
        rows = torch.cat(group.rows)
        order = torch.argsort(rows, stable=True)
        counts.append(torch.bincount(rows, minlength=q_tiles))
        cols.append(torch.cat(group.cols)[order])
        kind = torch.cat(group.kinds)[order]
        kinds.append(which[torch.where(kind > 0, kind + before, 0)])
        before += group.patterns
    ends = torch.cat(counts).cumsum(0).view(len(groups), q_tiles)
    starts = torch.cat((ends.new_zeros(1), ends[:-1, -1]))[:, None]
    ptr = torch.cat((starts, ends), 1)
    return Layout(
        q_len=lengths[0],
        kv_len=lengths[1],
        q_tile=tile,
        kv_tile=tile,
        ptr=ptr.view(len(parts), heads, -1),
        cols=torch.cat(cols).int(),
        kinds=torch.cat(kinds).int(),
        bits=table,
        q_index=_index([g.q_index for g in groups], q_tiles * tile, heads),
        kv_index=_index([g.k_index for g in groups], k_tiles * tile, heads),
    )


def _index(tables: list[list[Tensor]], size: int, heads: int) -> Tensor:
    whole = [torch.cat(table) for table in tables]
    filled = [torch.nn.functional.pad(x, (0, size - len(x)), value=-1) for x in whole]
    return torch.stack(filled).int().view(-1, heads, size)
