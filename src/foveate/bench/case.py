"""A case: one attention pattern for one length, in the forms that measuring needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops import Layout, Mask, causal


class Declined(Exception):
    """A contestant doesn't take part in a cell; the text says why."""


Seen = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query index, key index) -> bool, integer tensors that broadcast."""


@dataclass(frozen=True)
class Case:
    """One pattern of `length` queries on as many keys.

    Attributes:
        name: as the command line writes it.
        length: number of queries and of keys.
        build: the layout for tiles of this size, built anew at each call.
        allowed: for query rows (n,), which keys they see: bool (1, heads or 1, n, length). It
            doesn't come from the layout, so that it can judge it.
        mask: the mask; None if only a layout tells the pattern.
        seen: then this tells it element by element.
    """

    name: str
    length: int
    build: Callable[[int], Layout]
    allowed: Callable[[Tensor], Tensor]
    mask: Mask | None = None
    seen: Seen | None = None

    @property
    def dense(self) -> bool:
        """Whether everyone sees everyone."""
        return self.name == "full"

    @property
    def causal(self) -> bool:
        """Whether it is the causal mask and nothing else."""
        return self.mask == causal()


def from_mask(name: str, length: int, mask: Mask) -> Case:
    """The case of a mask."""
    every = torch.arange(length)

    def build(tile: int) -> Layout:
        # With positions given, nothing is taken from the cache of layouts.
        return mask.layout(length, length, tile, q_positions=every)

    def allowed(rows: Tensor) -> Tensor:
        return mask.dense(len(rows), length, q_positions=rows)

    return Case(name, length, build, allowed, mask=mask)


def from_layout(name: str, length: int, build: Callable[[int], Layout], seen: Seen) -> Case:
    """The case of a pattern that is no mask, the same for all heads."""
    keys, zero = torch.arange(length), torch.tensor(0)

    def allowed(rows: Tensor) -> Tensor:
        return seen(zero, zero, rows[:, None], keys)[None, None]

    return Case(name, length, build, allowed, seen=seen)
