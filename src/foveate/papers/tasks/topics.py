"""Which sentence is asked for? A lookup whose sequences have a tree.

The first token carries a topic. Behind it stand sentences, each of a topic and a value of its own:
in each some tokens carry both, the others no topic and a random value. The label is the value of
the sentence whose topic is the first token's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import Batch, Generated, distinct, generator


@dataclass(frozen=True)
class Topics(Generated):
    """Sequences of 1 + sentences * size tokens; a token's id is topic * (values + 1) + value.

    Topic `topics` is no topic, value `values` no value.

    Attributes:
        sentences: of a sequence.
        size: tokens of a sentence.
        carriers: tokens of a sentence that carry its topic and value.
        topics: distinct in a sequence.
        values: labels.
        pool: training sequences of a seed, which come again and again; None draws new ones.
        held: sequences in each of validation and test.
    """

    sentences: int = 6
    size: int = 8
    carriers: int = 3
    topics: int = 12
    values: int = 8
    pool: int | None = None
    held: int = 1024

    def __post_init__(self) -> None:
        if not 1 <= self.carriers <= self.size or self.topics < self.sentences:
            raise InputError(
                f"Topics: expected 1 to {self.size} carriers and at least {self.sentences} topics, "
                f"got {self.carriers} and {self.topics}."
            )

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return (self.topics + 1) * (self.values + 1)

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 1 + self.sentences * self.size

    def sentence(self) -> Tensor:
        """(length,) the sentence of each token, -1 for the first one."""
        return (torch.arange(self.length) - 1).div(self.size, rounding_mode="floor")

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split: inputs (count, length), targets (count, 1)."""
        n, size, none = self.sentences, self.size, self.values + 1
        topic = distinct(count, self.topics, n, random)
        value = torch.randint(self.values, (count, n), generator=random)
        noise = torch.randint(self.values, (count, n, size), generator=random)
        ids = self.topics * none + noise
        carried = torch.rand(count, n, size, generator=random).argsort(-1) < self.carriers
        ids = torch.where(carried, (topic * none + value)[..., None], ids)
        asked = torch.randint(n, (count, 1), generator=random)
        first = topic.gather(1, asked) * none + self.values
        return Batch(torch.cat((first, ids.flatten(1)), 1), value.gather(1, asked))

    def batch(self, seed: int, number: int, size: int) -> Batch:
        """Training batch `number` of a seed."""
        if self.pool is None:
            return super().batch(seed, number, size)
        whole = _pool(self, seed)
        at = torch.randint(self.pool, (size,), generator=generator("pool", seed, number))
        return Batch(whole.inputs[at], whole.targets[at])


@lru_cache(maxsize=8)
def _pool(task: Topics, seed: int) -> Batch:
    assert task.pool is not None
    return task.drawn(0, task.pool, generator(repr(task), "pool", seed))
