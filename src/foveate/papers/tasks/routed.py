"""Two kinds of sequences that ask for different attention: look far back, or look near.

Token 0 begins a sequence to recall from, token 1 one of near text, so that a router can tell them
apart from their first tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foveate.papers.tasks.base import IGNORED, Batch, Generated, Split, distinct, generator

PAIRS, FIRST, LAST = 4, 1, 42  # pairs stand in positions 1 ... 41


@dataclass(frozen=True)
class FarRecall(Generated):
    """Four pairs of key and value among filler; at the end each key stands again, in random order.

    Tokens: 0 begins, 2 ... 15 are filler, 16 ... 31 keys, 32 ... 47 values. A key's value follows
    it, also at the end, where the key's target is that value; nothing else is scored.

    Attributes:
        length: of a sequence; pairs stand before position 42, questions in the last 8.
        held: sequences in each of validation and test.
    """

    length: int = 64
    held: int = 512

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return 48

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split: (count, length)."""
        inputs = torch.randint(2, 16, (count, self.length), generator=random)
        inputs[:, 0] = 0
        keys = 16 + distinct(count, 16, PAIRS, random)
        values = 32 + torch.randint(16, (count, PAIRS), generator=random)
        slots = distinct(count, (LAST - FIRST) // 2, PAIRS, random)
        at = FIRST + 2 * slots
        inputs.scatter_(1, at, keys).scatter_(1, at + 1, values)
        order = torch.rand(count, PAIRS, generator=random).argsort(1)
        asked = (self.length - 2 * PAIRS + 2 * torch.arange(PAIRS)).expand(count, PAIRS)
        inputs.scatter_(1, asked, keys.gather(1, order))
        inputs.scatter_(1, asked + 1, values.gather(1, order))
        targets = torch.full_like(inputs, IGNORED)
        return Batch(inputs, targets.scatter_(1, asked, values.gather(1, order)))


@dataclass(frozen=True)
class NearText(Generated):
    """A Markov chain of order 1 over tokens 2 ... 47, the same one always; each token is scored.

    Attributes:
        length: of a sequence; token 1 begins it.
        held: sequences in each of validation and test.
    """

    length: int = 64
    held: int = 256

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return 48

    @cached_property
    def odds(self) -> Tensor:
        """(46, 46), the chain: row by row a softmax of 2 N(0, 1)."""
        return (2 * torch.randn(46, 46, generator=generator("near text"))).softmax(-1)

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split: (count, length)."""
        tokens = [torch.randint(46, (count,), generator=random)]
        for _ in range(self.length - 1):
            tokens.append(torch.multinomial(self.odds[tokens[-1]], 1, generator=random)[:, 0])
        text = 2 + torch.stack(tokens, 1)
        inputs = torch.cat((torch.ones(count, 1, dtype=torch.int64), text[:, :-1]), 1)
        return Batch(inputs, text)


@dataclass(frozen=True)
class Mixed:
    """Three quarters of a batch to recall from, a quarter of near text.

    Attributes:
        far, near: the kinds.
    """

    far: FarRecall = FarRecall()
    near: NearText = NearText()

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.far.vocab

    def batch(self, seed: int, number: int, size: int) -> Batch:
        """Training batch `number` of a seed; those to recall from come first."""
        far = self.far.batch(seed, number, size - size // 4)
        near = self.near.batch(seed, number, size // 4)
        return Batch(*(torch.cat(both) for both in zip(far, near)))

    def held_out(self, split: Split, size: int) -> Iterator[Batch]:
        """All of both."""
        yield from self.far.held_out(split, size)
        yield from self.near.held_out(split, size)

    def describe(self) -> str:
        """Both kinds."""
        return f"{self.far.describe()}; {self.near.describe()}"
