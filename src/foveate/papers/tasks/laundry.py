"""The Laundry List with symbols: N are listed, all but one again, and the last is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import IGNORED, Batch, Generated, distinct


@dataclass(frozen=True)
class Laundry(Generated):
    """Lists of `least` to `most` distinct symbols; only what is left is scored.

    Symbols are 2 ... symbols + 1; 0 stands before the second list, 1 asks. Behind the question the
    sequence is filled with zeros. With N = 3:

        inputs   5 2 7 0 7 5 1 0 0
        targets  . . . . . . 2 . .

    Attributes:
        least, most: N; each is as likely. Equal, all sequences end with the question.
        symbols: different ones.
        held: sequences in each of validation and test.

    Raises:
        InputError: least below 2, most below least, or fewer symbols than that.
    """

    least: int = 3
    most: int = 8
    symbols: int = 32
    held: int = 512

    def __post_init__(self) -> None:
        if not 2 <= self.least <= self.most <= self.symbols:
            raise InputError(
                f"Laundry: expected 2 <= least <= most <= symbols, got {self.least}, {self.most} "
                f"and {self.symbols}."
            )
        if self.held < 1:
            raise InputError(f"Laundry: held must be 1 or more, got {self.held}.")

    @property
    def length(self) -> int:
        """Of a sequence."""
        return 2 * self.most + 1

    @property
    def vocab(self) -> int:
        """The symbols and two marks."""
        return self.symbols + 2

    def of(self, items: int) -> Laundry:
        """The same with N = items only."""
        return replace(self, least=items, most=items)

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split: (count, 2 most + 1)."""
        sizes = torch.randint(self.least, self.most + 1, (count,), generator=random)
        listed = distinct(count, self.symbols, self.most, random) + 2
        noise = torch.rand(count, self.most, generator=random)
        inputs = torch.zeros(count, 2 * self.most + 1, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        for items in sizes.unique().tolist():
            at = (sizes == items).nonzero()[:, 0]
            order = noise[at, :items].argsort(1)
            mixed = listed[at, :items].gather(1, order)
            inputs[at, :items] = listed[at, :items]
            inputs[at, items + 1 : 2 * items] = mixed[:, 1:]
            inputs[at, 2 * items] = 1
            targets[at, 2 * items] = mixed[:, 0]
        return Batch(inputs, targets)

    def told(self, inputs: Tensor) -> Tensor:
        """The inputs at one length for every `most`: a list that `of` asks was never trained on."""
        return torch.nn.functional.pad(inputs, (0, 2 * self.symbols + 1 - inputs.shape[1]))
