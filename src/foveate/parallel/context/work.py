"""How much work each query, and so each rank, has under a mask or a layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops import Layout, Mask
from foveate.ops.layout import bits as bitset
from foveate.parallel.context.rule import Rule, rule_of
from foveate.parallel.context.sharding import Sharding


def row_pairs(seen: Layout | Mask, length: int | None = None) -> Tensor:
    """Keys that each query sees, (S,) int64, summed over the heads and batch entries that differ.

    Args:
        seen: a layout, or a mask with the `length` of its sequence.
        length: S.
    """
    if isinstance(seen, Mask):
        assert length is not None
        seen = seen.layout(length, length, 64)
    out = torch.zeros(seen.q_len + 1, dtype=torch.int64, device=seen.device)
    if not seen.cols.numel():
        return out[:-1]
    plain = seen.q_index is None and seen.kv_index is None and seen.gathered is None
    ranged = seen.key_range is not None or seen.row_range is not None
    every = torch.arange(seen.cols.numel(), device=seen.device)
    slow = torch.ones_like(every, dtype=torch.bool)
    if plain and not ranged:  # each distinct tile is counted once, but for the last column
        whole = seen.kv_len // seen.kv_tile
        slow = seen.cols.long() >= whole
        fast = every[~slow]
        sums = bitset.unpack(seen.bits, seen.q_tile).sum(-1)
        table = torch.cat((torch.full_like(sums[:1], seen.kv_tile), sums)) if len(sums) else (
            torch.full((1, seen.q_tile), seen.kv_tile, dtype=torch.int64, device=seen.device)
        )  # fmt: skip
        tiles = seen.entry_rows[fast] % seen.q_tiles
        by_tile = torch.zeros(seen.q_tiles, seen.q_tile, dtype=torch.int64, device=seen.device)
        by_tile.index_add_(0, tiles, table[seen.kinds[fast].long()])
        out[:-1] += by_tile.reshape(-1)[: seen.q_len]
    for part in every[slow].split(1024):
        rows = seen.entry_queries(part)
        counts = seen.entry_mask(part).sum(2)
        out.index_add_(0, rows.masked_fill(rows < 0, seen.q_len).reshape(-1), counts.reshape(-1))
    return out[:-1]


@dataclass(frozen=True)
class Balance:
    """How evenly a sharding spreads the work.

    Attributes:
        pairs: for each rank, (query, key) pairs that attend: its useful operations.
        area: for each rank, elements of the tiles that it visits: what it computes.
    """

    pairs: tuple[int, ...]
    area: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """Largest by mean, of pairs; 1 is even."""
        return _uneven(self.pairs)

    @property
    def area_imbalance(self) -> float:
        """Largest by mean, of visited tiles' elements."""
        return _uneven(self.area)


def _uneven(values: tuple[float, ...] | tuple[int, ...]) -> float:
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0


def balance(seen: Mask | Layout | Rule | None, sharding: Sharding, tile: int = 64) -> Balance:
    """Work of each rank if every rank's queries see the whole sequence, key tile by key tile.

    Args:
        seen: who sees whom; None is everyone.
        sharding: who holds what.
        tile: size of a tile.
    """
    rule = rule_of(seen, sharding.length)
    keys = torch.arange(sharding.length)
    pairs, area = [], []
    for mine in sharding.index:
        part = rule.part(mine, keys, tile=tile)
        pairs.append(round(part.pairs))
        area.append(part.tile_area)
    return Balance(tuple(pairs), tuple(area))
