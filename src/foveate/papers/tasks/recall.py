"""Multi-query associative recall (MQAR), as Zoology defines it.

Arora, Eyuboglu et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models",
arXiv 2312.04927, section 3 and appendix: pairs of key and value stand at the beginning, each key is
asked for again once, later, and at that place the model must predict the key's value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import IGNORED, Batch, Generated, distinct


@dataclass(frozen=True)
class Recall(Generated):
    """MQAR: sequences of `length` tokens that begin with `pairs` keys, each before its value.

    Keys are distinct, drawn from tokens 1 ... vocab // 2 - 1; values are distinct, drawn from
    vocab // 2 ... vocab - 1. The rest of the sequence has (length - 2 pairs) // 2 slots, two tokens
    each. Each key is put at the beginning of one slot: slot g (from 1) is chosen with a
    probability proportional to g^(power - 1), without replacement, so most keys are asked for soon
    and some late. The target at such a key is its value, which doesn't follow in the sequence. All
    other tokens of the rest are noise from the whole vocabulary, or 0 if `noise` is False.

    With `pairs=2, length=12, noise=False` for instance (targets elsewhere are IGNORED):

        inputs   2  8  4  7 | 4  0 | 0  0 | 2  0 | 0  0
        targets               7             8

    Attributes:
        tokens: the vocabulary; must exceed the length.
        length: even; at least 4 pairs.
        pairs: keys, and questions.
        power: Zoology's alpha, 0.01: near 1 / g; 1 is uniform.
        noise: random tokens between the questions.
        held: sequences in each of validation and test.

    Raises:
        InputError: the sizes don't fit together.
    """

    tokens: int = 8192
    length: int = 64
    pairs: int = 4
    power: float = 0.01
    noise: bool = True
    held: int = 512

    def __post_init__(self) -> None:
        if self.length % 2 or self.length < 4 * self.pairs or self.pairs < 1:
            raise InputError(
                f"Recall: length {self.length} must be even and hold {self.pairs} pairs and their "
                f"questions, {4 * self.pairs} tokens or more."
            )
        if self.tokens <= self.length:
            raise InputError(
                f"Recall: a vocabulary of {self.tokens} must exceed the length, {self.length}."
            )

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.tokens

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split: (count, length)."""
        pairs, first = self.pairs, 2 * self.pairs
        half = self.tokens // 2
        keys = 1 + distinct(count, half - 1, pairs, random)
        values = half + distinct(count, self.tokens - half, pairs, random)
        slots = (self.length - first) // 2
        weights = torch.arange(1.0, slots + 1).pow(self.power - 1).expand(count, slots)
        asked = first + 2 * torch.multinomial(weights, pairs, generator=random)
        if self.noise:
            inputs = torch.randint(self.tokens, (count, self.length), generator=random)
        else:
            inputs = torch.zeros(count, self.length, dtype=torch.int64)
        inputs[:, 0:first:2] = keys
        inputs[:, 1:first:2] = values
        inputs.scatter_(1, asked, keys)
        targets = torch.full_like(inputs, IGNORED).scatter_(1, asked, values)
        return Batch(inputs, targets)
