"""Copying: a random string, a mark, and the string again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import IGNORED, Batch, Generated


@dataclass(frozen=True)
class Copying(Generated):
    """Repeat `string` symbols, drawn with replacement from 1 ... symbols, after the mark 0.

    A sequence has 2 string tokens: the string, the mark, and the string without its last symbol.
    From the mark on every position is scored. With `string=3`:

        inputs   5  2  7 | 0  5  2
        targets            5  2  7

    Attributes:
        string: symbols to copy.
        symbols: different ones; the mark is one token more.
        held: sequences in each of validation and test.

    Raises:
        InputError: a size is below 1.
    """

    string: int = 32
    symbols: int = 31
    held: int = 512

    def __post_init__(self) -> None:
        for name in ("string", "symbols", "held"):
            if getattr(self, name) < 1:
                raise InputError(f"Copying: {name} must be 1 or more, got {getattr(self, name)}.")

    @property
    def vocab(self) -> int:
        """The symbols and the mark."""
        return self.symbols + 1

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split: (count, 2 string)."""
        string = torch.randint(1, self.vocab, (count, self.string), generator=random)
        mark = torch.zeros(count, 1, dtype=torch.int64)
        inputs = torch.cat([string, mark, string[:, :-1]], 1)
        return Batch(inputs, torch.cat([torch.full_like(string, IGNORED), string], 1))
