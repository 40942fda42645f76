"""The Laundry List with symbols: N are listed, all but one again, and the last is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import IGNORED, Batch, Generated, distinct


@dataclass(frozen=True)
class Laundry(Generated):
    """Lists of `least` to `most` distinct symbols; only what is left is scored.

    Symbols are 2 ... symbols + 1. Both lists have places of their own, `room` and room - 1, filled
    up with zeros, and 1 asks behind them, always at the same place. With N = 3 and room = 4:

        inputs   5 2 7 0   7 5 0   1
        targets  . . . .   . . .   2

    Attributes:
        least, most: N; each is as likely.
        symbols: different ones.
        room: places of the first list; None is `most`.
        held: sequences in each of validation and test.

    Raises:
        InputError: least below 2, most below least, fewer symbols than that, or no room.
    """

    least: int = 3
    most: int = 8
    symbols: int = 32
    room: int | None = None
    held: int = 512

    def __post_init__(self) -> None:
        if not 2 <= self.least <= self.most <= self.symbols:
            raise InputError(
                f"Laundry: expected 2 <= least <= most <= symbols, got {self.least}, {self.most} "
                f"and {self.symbols}."
            )
        if self.places < self.most:
            raise InputError(f"Laundry: room={self.room} is below most={self.most}.")
        if self.held < 1:
            raise InputError(f"Laundry: held must be 1 or more, got {self.held}.")

    @property
    def places(self) -> int:
        """Of the first list."""
        return self.most if self.room is None else self.room

    @property
    def length(self) -> int:
        """Of a sequence."""
        return 2 * self.places

    @property
    def vocab(self) -> int:
        """The symbols and two marks."""
        return self.symbols + 2

    def of(self, items: int) -> Laundry:
        """The same with N = items only, in the same places."""
        return replace(self, least=items, most=items, room=self.places)

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split: (count, length)."""
        sizes = torch.randint(self.least, self.most + 1, (count,), generator=random)
        listed = distinct(count, self.symbols, self.most, random) + 2
        noise = torch.rand(count, self.most, generator=random)
        inputs = torch.zeros(count, self.length, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        inputs[:, -1] = 1
        for items in sizes.unique().tolist():
            at = (sizes == items).nonzero()[:, 0]
            order = noise[at, :items].argsort(1)
            mixed = listed[at, :items].gather(1, order)
            inputs[at, :items] = listed[at, :items]
            inputs[at, self.places : self.places + items - 1] = mixed[:, 1:]
            targets[at, -1] = mixed[:, 0]
        return Batch(inputs, targets)
