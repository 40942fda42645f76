"""What every task is: batches that depend on (split, seed, number) alone, and disjoint splits.

Nothing is drawn from a running random state, so a training that is resumed at step n sees the batch
that it would have seen, and two models that are compared see the same data in the same order.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from foveate.ops.errors import InputError

IGNORED = -100
"""Target of a position that isn't scored, as in torch's cross entropy."""

Split = Literal["train", "validation", "test"]


class Batch(NamedTuple):
    """Sequences and what each position must predict.

    Attributes:
        inputs: (B, L) int64.
        targets: (B, L) int64, aligned: `targets[:, i]` is predicted from `inputs[:, : i + 1]`;
            IGNORED where nothing is scored.
    """

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(self.inputs.to(device), self.targets.to(device))


class Task(Protocol):
    """Where batches come from.

    Attributes:
        vocab: number of tokens; ids are below it.
    """

    @property
    def vocab(self) -> int:
        """Number of tokens."""

    def batch(self, seed: int, number: int, size: int) -> Batch:
        """Training batch `number` of a seed: always the same one, (size, L)."""

    def held_out(self, split: Split, size: int) -> Iterator[Batch]:
        """All of the validation or test split, the same for every seed, in batches of `size`."""

    def describe(self) -> str:
        """One line that names the data, with a digest where it was read from somewhere."""


def generator(*what: object) -> torch.Generator:
    """A generator that depends on all that is given and on nothing else."""
    made = hashlib.sha256(":".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(made[:8], "little") >> 1)


def distinct(count: int, of: int, chosen: int, random: torch.Generator) -> Tensor:
    """(count, chosen) numbers below `of`, distinct in each row, in random order."""
    return torch.rand(count, of, generator=random).topk(chosen, dim=1).indices


def split_of(rows: Tensor) -> Tensor:
    """Which split a sequence belongs to, from its tokens alone: (n,) int64.

    1 is validation, 2 is test (a tenth of all sequences each), 0 is train. It is a multiplicative
    hash over the row in 64-bit integers that wrap around, so the same sequence is always in the
    same split, whichever seed or batch drew it.

    Args:
        rows: (n, L) int64.
    """
    factors = torch.randint(1 << 62, (rows.shape[1],), generator=generator("split")) * 2 + 1
    mixed = ((rows + 1) * factors).sum(1)
    mixed = (mixed ^ (mixed >> 31)) * 0x7FB5D329728EA185
    tenth = (mixed ^ (mixed >> 27)).remainder(10)
    return torch.where(tenth < 2, tenth + 1, 0)


class Generated(ABC):
    """A task whose sequences are drawn; each is of one split only, by `split_of`.

    A sequence that is drawn for one split and belongs to another is drawn again.
    """

    held: int

    @property
    @abstractmethod
    def vocab(self) -> int:
        """Number of tokens."""

    @abstractmethod
    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split, (count, L)."""

    def batch(self, seed: int, number: int, size: int) -> Batch:
        """Training batch `number` of a seed."""
        return self.drawn(0, size, generator(repr(self), "train", seed, number))

    def held_out(self, split: Split, size: int) -> Iterator[Batch]:
        """The `held` sequences of the validation or the test split."""
        inputs, targets = _held(self, split)
        for start in range(0, self.held, size):
            yield Batch(inputs[start : start + size], targets[start : start + size])

    def describe(self) -> str:
        """The task and its parameters."""
        return repr(self)

    def told(self, inputs: Tensor) -> Tensor:
        """What of the inputs decides which split a sequence is of: (n, L) int64."""
        return inputs

    def drawn(self, wanted: int, size: int, random: torch.Generator) -> Batch:
        """(size, L) sequences of the split that `split_of` numbers so.

        Raises:
            InputError: hardly any are drawn; the task is too small to have three splits.
        """
        found: list[Batch] = []
        missing = size
        for _ in range(50):
            drawn = self.draw(max(8, missing * (2 if wanted == 0 else 12)), random)
            at = (split_of(self.told(drawn.inputs)) == wanted).nonzero()[:missing, 0]
            found.append(Batch(drawn.inputs[at], drawn.targets[at]))
            missing -= len(at)
            if not missing:
                return Batch(*map(torch.cat, zip(*found)))
        raise InputError(
            f"{self!r} has too few different sequences for three splits; make it longer, or give "
            "it more symbols."
        )


@lru_cache(maxsize=16)
def _held(task: Generated, split: Split) -> Batch:
    wanted = {"train": 0, "validation": 1, "test": 2}[split]
    chunks = [
        task.drawn(wanted, min(64, task.held - start), generator(repr(task), split, start))
        for start in range(0, task.held, 64)
    ]
    return Batch(*map(torch.cat, zip(*chunks)))
