"""Sequences of items by user, and their leave-one-out split.

    test        the last item of each sequence, from all before it
    validation  the one before it, from all before that
    training    the rest: every item from those before it

Sequences of fewer than 3 items are trained on whole and judge nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from foveate.methods.mqsa_ted import Transitions
from foveate.ops.errors import InputError
from foveate.recommend import files, movielens

FILE = "sequences.txt"


@dataclass(frozen=True, eq=False)
class SequenceData:
    """See the module's text.

    Attributes:
        title: what it is.
        sequences: item numbers in order of time, one sequence a user.
        items: V.
        names: of items, to show; empty where there are none.
    """

    title: str
    sequences: tuple[tuple[int, ...], ...] = field(repr=False)
    items: int
    names: dict[int, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not any(len(s) > 1 for s in self.training):
            raise InputError(f"{self.title}: no sequence has an item that follows another.")
        most = max(max(s) for s in self.sequences if s)
        if most >= self.items:
            raise InputError(f"{self.title}: item {most}, but there are {self.items} items.")

    @cached_property
    def training(self) -> tuple[tuple[int, ...], ...]:
        """What each sequence is trained on."""
        return tuple(s[:-2] if len(s) > 2 else s for s in self.sequences)

    def transitions(self, span: int = 1) -> Transitions:
        """Counted in the training part."""
        return Transitions(self.training, self.items, span)

    def batches(
        self, length: int, size: int, random: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Every training sequence once: (items (B, T), targets (B, T)), padded on the left."""
        longer = torch.tensor([n for n, s in enumerate(self.training) if len(s) > 1])
        order = longer[torch.randperm(len(longer), generator=random)]
        for some in order.split(size):
            rows = [self.training[n] for n in some.tolist()]
            yield (
                self.padded([row[:-1] for row in rows], length),
                self.padded([row[1:] for row in rows], length),
            )

    def padded(self, rows: list[tuple[int, ...]], length: int) -> Tensor:
        """The last `length` items of each row, `items` in front of shorter ones: (B, length)."""
        made = torch.full((len(rows), length), self.items)
        for n, row in enumerate(rows):
            last = row[-length:]
            if last:
                made[n, length - len(last) :] = torch.tensor(last)
        return made

    def judged(self, part: str) -> list[tuple[tuple[int, ...], int]]:
        """What is known and what comes next, for each sequence of "validation" or "test"."""
        if part not in ("validation", "test"):
            raise InputError(f"judged({part!r}): expected 'validation' or 'test'.")
        back = 1 if part == "test" else 2
        return [(s[:-back], s[-back]) for s in self.sequences if len(s) > 2]

    def digest(self) -> str:
        """16 hex digits over all sequences."""
        return hashlib.sha256(repr((self.items, self.sequences)).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """What it is and how large, with its digest."""
        total = sum(map(len, self.sequences))
        return (
            f"{self.title}: {len(self.sequences):,} sequences of {self.items:,} items, "
            f"{total:,} in all; {self.digest()}"
        )


def read(source: str) -> SequenceData:
    """`ml-100k`, or a folder with sequences.txt: `user item item ...` in order of time, by line.

    Raises:
        InputError: as `foveate.recommend.files`.
        MissingPackageError: MovieLens isn't installed.
    """
    if source == "ml-100k":
        rows, names = movielens.sequences()
        return SequenceData("MovieLens 100K by time", tuple(map(tuple, rows)), len(names), names)
    folder = Path(source).expanduser()
    found = files.sequences(folder / FILE)
    names = files.listed_names(folder / "item_list.txt")
    items = max([max((max(row) for row in found if row), default=-1), *names]) + 1
    return SequenceData(folder.name, tuple(map(tuple, found)), items, names)
