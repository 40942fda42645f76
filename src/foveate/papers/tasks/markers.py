"""Which of two markers occurs first in a long sequence: a question about one place of many."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from typing_extensions import override

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import Batch, Generated, distinct

PADDING, FIRST, A, B, FILLER = range(5)


@dataclass(frozen=True)
class FirstMarker(Generated):
    """FIRST, then filler, with `times` markers A and as many B at random places.

    The target (B, 1) is 0 if the first marker is an A, 1 if it is a B. All later markers say
    nothing, so a mean over the markers is no answer. With `length=9, times=2` for instance:

        inputs   1  6  3  4  7  2  2  5  3      target 1

    Attributes:
        length: with FIRST.
        times: each marker occurs.
        filler: different tokens of filler.
        held: sequences in each of validation and test.
        shorter: (length, batches) of shorter sequences that training begins with: a place among
            many is found by a model that has found it among few.

    Raises:
        InputError: the markers don't fit, or what is shorter isn't.
    """

    length: int = 1024
    times: int = 2
    filler: int = 11
    held: int = 512
    shorter: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if min(self.times, self.filler, self.held) < 1 or self.length <= 2 * self.times:
            raise InputError(
                f"{self!r}: each number must be 1 or more, and the length above {2 * self.times}."
            )

        for length, batches in self.shorter:
            if batches < 1 or not 2 * self.times < length < self.length:
                raise InputError(
                    f"{self!r}: expected 1 batch or more of each shorter length, and lengths from "
                    f"{2 * self.times + 1} to {self.length - 1}."
                )

    @override
    def batch(self, seed: int, number: int, size: int) -> Batch:
        """Training batch `number` of a seed; the first ones are shorter."""
        before = 0
        for length, batches in self.shorter:
            before += batches
            if number < before:
                return replace(self, length=length, shorter=()).batch(seed, number, size)
        return super().batch(seed, number, size)

    @property
    def vocab(self) -> int:
        """Padding (which doesn't occur), FIRST, the markers and the filler."""
        return FILLER + self.filler

    @property
    def classes(self) -> int:
        """A or B."""
        return 2

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split: (count, length)."""
        inputs = torch.randint(FILLER, self.vocab, (count, self.length), generator=random)
        inputs[:, 0] = FIRST
        places = 1 + distinct(count, self.length - 1, 2 * self.times, random)
        for marker, at in ((A, places[:, : self.times]), (B, places[:, self.times :])):
            inputs.scatter_(1, at, torch.full_like(at, marker))
        first = places.argmin(1, keepdim=True)
        return Batch(inputs, (first >= self.times).long())
