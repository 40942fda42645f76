"""Pairs and back-copies: the smallest language on which heads learn to do nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import Batch, Generated, generator

START = 0


@lru_cache(maxsize=8)
def pairs(symbols: int) -> Tensor:
    """(symbols, symbols) chances of what follows, the same for every task; START never does."""
    logits = 2.0 * torch.randn(symbols, symbols, generator=generator("pairs", symbols))
    logits[:, START] = -torch.inf
    return logits.softmax(-1)


@dataclass(frozen=True)
class Backcopy(Generated):
    """A start token, then by a table of pairs; but after a trigger comes what was before it.

        start  a  b  t  b  c  ...          t is a trigger

    The Bigram-Backcopy task (Guo et al. 2024, arXiv 2410.13835, section 2), with a table that is
    drawn where the paper counts pairs in text. All positions are scored: the table is learnt by
    every layer's feed-forward part, the copy by a head that has nothing to do but at triggers.

    Attributes:
        length: of inputs.
        symbols: ids; 0 is the start token and 1 ... `triggers` are triggers.
        triggers: how many.
        held: sequences in each of validation and test.

    Raises:
        InputError: a size is below 1, length below 3, or there is nothing besides triggers.
    """

    length: int = 64
    symbols: int = 64
    triggers: int = 3
    held: int = 512

    def __post_init__(self) -> None:
        for name, least in (("length", 3), ("triggers", 1), ("held", 1)):
            if getattr(self, name) < least:
                raise InputError(
                    f"Backcopy: {name} must be {least} or more, got {getattr(self, name)}."
                )
        if self.symbols < self.triggers + 3:
            raise InputError(
                f"Backcopy: {self.symbols} symbols are too few; expected {self.triggers + 3} or "
                "more: the start token, triggers, and two others."
            )

    @property
    def vocab(self) -> int:
        """The symbols."""
        return self.symbols

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split, (count, length)."""
        table = pairs(self.symbols)
        first = torch.randint(self.triggers + 1, self.symbols, (count,), generator=random)
        found = [torch.full_like(first, START), first]
        for _ in range(self.length - 1):
            before, now = found[-2:]
            new = torch.multinomial(table[now], 1, generator=random)[:, 0]
            found.append(torch.where(self.is_trigger(now), before, new))
        whole = torch.stack(found, 1)
        return Batch(whole[:, :-1], whole[:, 1:])

    def is_trigger(self, ids: Tensor) -> Tensor:
        """Which tokens are triggers, bool."""
        return (ids >= 1) & (ids <= self.triggers)
