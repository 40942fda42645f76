"""A random string, twice: what induction heads are found on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import IGNORED, Batch, Generated


@dataclass(frozen=True)
class Repeated(Generated):
    """A string of `least` to `most` symbols, and the same string again, without a mark between.

    Strings are padded behind with their own first symbols, on and on, so that all sequences have
    2 most - 1 inputs; scored is the second copy but its first symbol, which nothing foretells:

        inputs   5 2 7 5 2   (7 5 ... is what follows)
        targets  . . . 2 7

    Attributes:
        least, most: symbols of a string; each length is as likely.
        symbols: different ones.
        held: sequences in each of validation and test.

    Raises:
        InputError: a size is below 2, or most below least.
    """

    least: int = 8
    most: int = 23
    symbols: int = 48
    held: int = 512

    def __post_init__(self) -> None:
        for name in ("least", "symbols", "held"):
            if getattr(self, name) < 2:
                raise InputError(f"Repeated: {name} must be 2 or more, got {getattr(self, name)}.")
        if self.most < self.least:
            raise InputError(f"Repeated: most={self.most} is below least={self.least}.")

    @property
    def vocab(self) -> int:
        """The symbols."""
        return self.symbols

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split: (count, 2 most - 1)."""
        length = torch.randint(self.least, self.most + 1, (count, 1), generator=random)
        string = torch.randint(self.symbols, (count, self.most), generator=random)
        at = torch.arange(2 * self.most)
        whole = string.gather(1, at % length)
        second = (at[1:] > length) & (at[1:] < 2 * length)
        return Batch(whole[:, :-1], torch.where(second, whole[:, 1:], IGNORED))
