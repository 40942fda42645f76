"""Regions: a partition of tokens that whole groups of queries and keys are routed by.

BiFormer cuts an image into S x S regions; the same table serves a sequence, a video, or any other
partition. A region's row lists its tokens in order; -1 fills the rows of smaller regions, so that
padding is simply not listed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.masks.grid import per_axis


@dataclass(frozen=True, eq=False)
class Regions:
    """Which tokens each region holds.

    Attributes:
        table: (1 or B, p, n) int64, tokens of each of p regions, -1 is none; each token stands in
            one region, or in none (padding).
        tokens: how many there are.
        boxes: (regions, tokens of each) on each axis, where they cut a grid evenly.
    """

    table: Tensor
    tokens: int
    boxes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def count(self) -> int:
        """Number of regions, p."""
        return self.table.shape[1]

    @property
    def size(self) -> int:
        """Tokens of the largest region, n."""
        return self.table.shape[2]

    @cached_property
    def per_region(self) -> Tensor:
        """(1 or B, p): tokens in each."""
        return (self.table >= 0).sum(-1)

    @cached_property
    def whole(self) -> bool:
        """Whether no row of the table has a hole."""
        return bool((self.table >= 0).all())

    @cached_property
    def of(self) -> Tensor:
        """(1 or B, N): the region of each token; 0 for those in none."""
        found = torch.zeros(len(self.table), self.tokens + 1, dtype=torch.int64)
        found = found.to(self.table.device)
        number = torch.arange(self.count, device=self.table.device)[None, :, None]
        at = self.table.where(self.table >= 0, self.tokens).flatten(1)
        return found.scatter(1, at, number.expand_as(self.table).flatten(1))[:, : self.tokens]

    def only(self, real: Tensor) -> Regions:
        """The same without the tokens that aren't real; real (1 or B, N) bool."""
        if bool(real.all()):
            return self
        batch = max(len(real), len(self.table))
        table = self.table.expand(batch, -1, -1)
        kept = real.expand(batch, -1).gather(1, table.clamp_min(0).flatten(1)).view_as(table)
        return Regions(table.where(kept & (table >= 0), -1), self.tokens)

    def padded(self, tile: int) -> Tensor:
        """(1 or B, p, m tile): the table, its rows filled up to whole tiles."""
        return torch.nn.functional.pad(self.table, (0, -self.size % tile), value=-1)

    def rows(self, x: Tensor) -> Tensor:
        """Values x (B, H, N, D) by region, (B, H, p, n, D); 0 where there is no token."""
        table = self.table.clamp_min(0)
        if len(table) == 1:
            found = x[:, :, table[0]]
        else:
            at = table.flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            found = x.gather(2, at).unflatten(2, table.shape[1:])
        if self.whole:
            return found
        return torch.where((self.table >= 0)[:, None, :, :, None], found, 0.0)

    def means(self, x: Tensor) -> Tensor:
        """Means of x (B, H, N, D) over each region, in fp32 or wider: (B, H, p, D)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.boxes is not None:  # without a copy, axis by axis
            counts, sizes = self.boxes
            x = x.unflatten(2, [n for pair in zip(counts, sizes) for n in pair])
            for axis in reversed(range(len(sizes))):
                x = x.sum(3 + 2 * axis, dtype=wide)
            return x.flatten(2, 1 + len(sizes)) / self.size
        total = self.rows(x).sum(3, dtype=wide)
        return total / self.per_region.clamp_min(1)[:, None, :, None]


def grid_regions(
    shape: Sequence[int],
    regions: int | Sequence[int],
    size: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Regions:
    """A grid cut into boxes, numbered and read row by row.

    Where an axis is no multiple of its number of regions, the last ones are smaller, or empty.

    Args:
        shape: tokens on each axis.
        regions: on each axis, or one number for all.
        size: tokens of a region on each axis; None is what just holds all tokens.
        device: where the table goes.

    Raises:
        InputError: numbers below 1, or regions that don't hold all tokens.
    """
    shape = tuple(shape)
    counts = per_axis("grid_regions", "regions", regions, len(shape))
    sizes = tuple(-(-n // s) for n, s in zip(shape, counts)) if size is None else tuple(size)
    if len(sizes) != len(shape) or any(c * s < n for n, c, s in zip(shape, counts, sizes)):
        raise InputError(
            f"grid_regions: {counts} regions of {sizes} tokens don't hold a grid of {shape}."
        )
    return _grid(shape, counts, sizes, str(device))


@lru_cache(maxsize=128)
def _grid(
    shape: tuple[int, ...], counts: tuple[int, ...], sizes: tuple[int, ...], device: str
) -> Regions:
    with torch.inference_mode(False):  # what is kept must serve training, too
        token = torch.zeros(1, 1, dtype=torch.int64)
        for length, count, size in zip(shape, counts, sizes):
            at = torch.arange(count * size).view(count, size)
            token = token[:, None, :, None] * length + at[None, :, None, :]
            inside = (at < length)[None, :, None, :].expand_as(token)
            token = token.masked_fill(~inside, -(1 << 40))  # stays negative on further axes
            token = token.reshape(-1, token.shape[2] * token.shape[3])
        table = token.clamp_min(-1)[None].to(device)
        even = all(c * s == n for n, c, s in zip(shape, counts, sizes))
        made = Regions(table, math.prod(shape), (counts, sizes) if even else None)
        _ = made.whole, made.of, made.per_region
        return made
