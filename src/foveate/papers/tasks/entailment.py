"""Entailment of sets: whether a set of symbols lies inside, across or outside of another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import Batch, Generated, distinct

ENTAILED, NEUTRAL, CONTRADICTED = range(3)
MARK = 1


@dataclass(frozen=True)
class Entailment(Generated):
    """A premise of distinct symbols, a mark, and a hypothesis, in random order: one label of three.

    Inside of the premise it is entailed (0), disjoint from it contradicted (2), and neutral (1) if
    some of it, not all, lies inside; each a third of the time. Symbols are 2 ... symbols + 1, the
    mark is 1, 0 is left to padding.

        inputs   9  4  7  2 | 4  9        targets   0

    Attributes:
        symbols: different ones.
        premise: of them in a premise.
        hypothesis: of them in a hypothesis, 2 or more.
        held: pairs in each of validation and test.

    Raises:
        InputError: sizes that don't fit each other.
    """

    symbols: int = 24
    premise: int = 6
    hypothesis: int = 3
    held: int = 1024

    def __post_init__(self) -> None:
        if not 2 <= self.hypothesis <= self.premise <= self.symbols - self.hypothesis:
            raise InputError(
                f"Entailment: expected 2 <= hypothesis <= premise <= symbols - hypothesis, got "
                f"{self.hypothesis}, {self.premise} and {self.symbols} symbols."
            )
        if self.held < 1:
            raise InputError(f"Entailment: held must be 1 or more, got {self.held}.")

    @property
    def vocab(self) -> int:
        """The symbols, the mark and the padding."""
        return self.symbols + 2

    @property
    def classes(self) -> int:
        """Entailed, neutral, contradicted."""
        return 3

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Pairs of any split: inputs (count, premise + 1 + hypothesis), targets (count, 1)."""
        order = torch.rand(count, self.symbols, generator=random).argsort(1)
        premise, others = order[:, : self.premise], order[:, self.premise :]
        label = torch.randint(3, (count, 1), generator=random)
        some = torch.randint(1, self.hypothesis, (count, 1), generator=random)
        inside = torch.where(label == ENTAILED, self.hypothesis, some)
        inside = torch.where(label == CONTRADICTED, 0, inside)
        own = premise.gather(1, distinct(count, self.premise, self.hypothesis, random))
        places = torch.arange(self.hypothesis)
        chosen = torch.where(places < inside, own, others[:, : self.hypothesis])
        mixed = chosen.gather(1, distinct(count, self.hypothesis, self.hypothesis, random))
        mark = torch.full((count, 1), MARK)
        return Batch(torch.cat([premise + 2, mark, mixed + 2], 1), label)
