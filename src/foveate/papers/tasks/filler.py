"""Associative recall among filler: pairs stand somewhere in noise, all are asked for at the end.

The task of the miniature of Dynamic Mask Attention. What a query needs is far away and few of many
tokens; where filler has tokens of its own, a token alone tells whether it is worth keeping.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import IGNORED, Batch, Generated, distinct, generator

FIRST = 2  # 0 begins a sequence, 1 is not used
STATES = 6


@dataclass(frozen=True)
class FillerRecall(Generated):
    """`pairs` pairs of key and value at random slots among filler; the end asks for all of them.

    Token 0 begins a sequence. Slots of two tokens follow, up to `spread` tokens; `pairs` of them
    hold a key and its value, everything else is filler. The last 2 pairs tokens are the keys in
    another order, each followed by its value, which is what is scored. Keys are 2 ... keys + 1,
    values the next `values` tokens, filler the next `filler`. With `blended` all of these tokens
    are used for all three (filler and values never equal one of the sequence's keys), so that a
    token alone doesn't tell what it is.

    With `length=16, pairs=2, spread=8, keys=3, values=3, filler=4` for instance:

        inputs   0  9  8  3  6  8 11  4  7 | 10 8  9 | 4  7  3  6
        targets                                        7     6

    A share of the rows of a training batch are Markov chains over a few tokens, with successors
    of their own for each row and all scored; to copy what followed before is learnt sooner there.

    Attributes:
        length: of a sequence.
        pairs: of key and value.
        spread: tokens behind the first in which the pairs stand.
        keys, values, filler: different tokens of each kind.
        blended: whether the three kinds share their tokens.
        chains: share of a training batch that are chains.
        held: sequences in each of validation and test.

    Raises:
        InputError: the sizes don't fit together.
    """

    length: int = 64
    pairs: int = 4
    spread: int = 36
    keys: int = 10
    values: int = 10
    filler: int = 26
    blended: bool = False
    chains: float = 0.25
    held: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= min(self.keys, self.spread // 2):
            raise InputError(f"{self!r}: as many keys and slots as pairs are needed.")
        if self.length < 1 + self.spread + 2 * self.pairs:
            raise InputError(
                f"FillerRecall: a length of {1 + self.spread + 2 * self.pairs} or more is needed, "
                f"got {self.length}."
            )
        if min(self.values, self.filler) < 1 or not 0 <= self.chains < 1:
            raise InputError(f"{self!r}: numbers must be 1 or more, chains a share below 1.")

    @property
    def vocab(self) -> int:
        """All tokens."""
        return FIRST + self.keys + self.values + self.filler

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split: (count, length)."""
        pairs, total = self.pairs, self.vocab - FIRST
        if self.blended:
            order = FIRST + distinct(count, total, total, random)
            keys, others = order[:, :pairs], order[:, pairs:]
            picked = torch.randint(total - pairs, (count, self.length + pairs), generator=random)
            drawn = others.gather(1, picked)
            inputs, values = drawn[:, : self.length].clone(), drawn[:, self.length :]
        else:
            first = FIRST + self.keys
            keys = FIRST + distinct(count, self.keys, pairs, random)
            values = first + torch.randint(self.values, (count, pairs), generator=random)
            inputs = torch.randint(
                first + self.values, self.vocab, (count, self.length), generator=random
            )
        inputs[:, 0] = 0
        slots = 1 + 2 * distinct(count, self.spread // 2, pairs, random)
        inputs.scatter_(1, slots, keys).scatter_(1, slots + 1, values)
        shuffled = distinct(count, pairs, pairs, random)
        inputs[:, -2 * pairs :: 2] = keys.gather(1, shuffled)
        inputs[:, 1 - 2 * pairs :: 2] = values.gather(1, shuffled)
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -2 * pairs :: 2] = values.gather(1, shuffled)
        return Batch(inputs, targets)

    def chain(self, count: int, random: torch.Generator) -> Batch:
        """Markov chains: (count, length); three of four steps go to a state's own successor."""
        states = FIRST + distinct(count, self.vocab - FIRST, STATES, random)
        after = torch.randint(STATES, (count, STATES), generator=random)
        jumps = torch.randint(STATES, (count, self.length + 1), generator=random)
        follow = torch.rand(count, self.length + 1, generator=random) < 0.75
        at = [jumps[:, 0]]
        for step in range(1, self.length + 1):
            own = after.gather(1, at[-1][:, None])[:, 0]
            at.append(torch.where(follow[:, step], own, jumps[:, step]))
        tokens = states.gather(1, torch.stack(at, 1))
        return Batch(tokens[:, :-1], tokens[:, 1:])

    def batch(self, seed: int, number: int, size: int) -> Batch:
        """Training batch `number` of a seed, its chains last."""
        chains = int(size * self.chains)
        random = generator(repr(self), "train", seed, number)
        parts = [self.drawn(0, size - chains, random)]
        if chains:
            parts.append(self.chain(chains, random))
        return Batch(*map(torch.cat, zip(*parts)))
