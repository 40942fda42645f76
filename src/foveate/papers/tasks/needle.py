"""A needle in filler: facts are told somewhere in a long text, and one is asked for at its end."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import IGNORED, Batch, Generated, distinct


@dataclass(frozen=True)
class Needle(Generated):
    """`needles` facts (mark, key, value) at random places in filler; at the end (mark, key) asks.

    Tokens: 0 is the mark, then `keys` keys, then `values` values, then the filler. Facts never
    overlap, their keys are distinct, and the last fact ends at least `outside` tokens before the
    question begins. Only the value of the key that is asked for is scored, at the last position.
    With `length=12, needles=1, keys=2, values=2, filler=3, outside=2` for instance:

        inputs   6  5  0  2  3  5  7  6  5  5 | 0  2
        targets                                   3

    Attributes:
        length: with the question.
        needles: facts that are told; one of them is asked for.
        keys, values, filler: different tokens of each kind.
        outside: tokens between the last fact and the question, at least.
        held: sequences in each of validation and test.

    Raises:
        InputError: the facts don't fit.
    """

    length: int = 256
    needles: int = 1
    keys: int = 8
    values: int = 8
    filler: int = 15
    outside: int = 0
    held: int = 512

    def __post_init__(self) -> None:
        if min(self.needles, self.keys, self.values, self.filler, self.held) < 1:
            raise InputError(f"{self!r}: each number must be 1 or more.")
        if self.needles > self.keys:
            raise InputError(
                f"Needle: {self.needles} facts need as many keys, there are {self.keys}."
            )
        if self.outside < 0 or self._room < 0:
            raise InputError(
                f"Needle: {self.needles} facts, {self.outside} tokens and the question need a "
                f"length of {3 * self.needles + max(0, self.outside) + 2} or more, "
                f"got {self.length}."
            )

    @property
    def _room(self) -> int:
        """Filler tokens among which the facts are spread."""
        return self.length - 2 - self.outside - 3 * self.needles

    @property
    def vocab(self) -> int:
        """The mark, keys, values and filler."""
        return 1 + self.keys + self.values + self.filler

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split: (count, length)."""
        first = 1 + self.keys + self.values
        inputs = torch.randint(first, self.vocab, (count, self.length), generator=random)
        keys = 1 + distinct(count, self.keys, self.needles, random)
        values = torch.randint(self.values, (count, self.needles), generator=random)
        values += 1 + self.keys
        # Filler before each fact: sorted draws from the room, so every spreading is equally likely.
        choices = distinct(count, self._room + self.needles, self.needles, random).sort(1).values
        at = choices + 2 * torch.arange(self.needles)
        for offset, tokens in enumerate((torch.zeros_like(keys), keys, values)):
            inputs.scatter_(1, at + offset, tokens)
        asked = torch.randint(self.needles, (count, 1), generator=random)
        inputs[:, -2] = 0
        inputs[:, -1:] = keys.gather(1, asked)
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -1:] = values.gather(1, asked)
        return Batch(inputs, targets)
