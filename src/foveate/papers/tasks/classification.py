"""Classification of texts, as a task to train an encoder on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foveate.ops.errors import InputError, nearest
from foveate.papers.tasks.base import Batch, Split, generator
from foveate.papers.tasks.labelled import Example, Labelled

PADDING, FIRST, SEPARATOR, UNKNOWN = range(4)
SPECIAL = 4
TOKENS = ("words", "bytes")
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Classification:
    """The label of each text, as one target (B, 1).

    A sequence is FIRST, the text's tokens, and for a pair SEPARATOR and the second text's; what is
    too long is cut, of a pair the longer text first. PADDING fills a batch up to its longest row.
    Training goes through all texts in a random order, then through all of them in another.

    Attributes:
        data: the texts.
        length: tokens of a sequence, at most.
        tokens: "words" (lower case, marks by themselves; those that the training texts hold
            `least` times, all others are UNKNOWN) or "bytes" (of UTF-8).
        least: see tokens.
        held: texts of each of validation and test, at most, taken evenly spread; None is all.

    Raises:
        InputError: a size is too small, or tokens is unknown.
    """

    data: Labelled
    length: int = 64
    tokens: str = "words"
    least: int = 2
    held: int | None = None

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise InputError(
                f"Classification(tokens={self.tokens!r}) is unknown; {nearest(self.tokens, TOKENS)}"
            )
        for name, least in (("length", 4), ("least", 1), ("held", 1)):
            given = getattr(self, name)
            if given is not None and given < least:
                raise InputError(f"Classification: {name} must be {least} or more, got {given}.")

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return SPECIAL + (256 if self.tokens == "bytes" else len(self._words))

    @property
    def classes(self) -> int:
        """Number of labels."""
        return len(self.data.labels)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words that are known, the first one being token SPECIAL."""
        return tuple(self._words)

    def batch(self, seed: int, number: int, size: int) -> Batch:
        """Training batch `number` of a seed: inputs (size, L), targets (size, 1)."""
        texts = self.data.train
        at = torch.arange(number * size, (number + 1) * size)
        orders = {
            epoch: torch.randperm(len(texts), generator=generator("texts", seed, epoch))
            for epoch in set((at // len(texts)).tolist())
        }
        return self._made(
            [texts[int(orders[i // len(texts)][i % len(texts)])] for i in at.tolist()]
        )

    def held_out(self, split: Split, size: int) -> Iterator[Batch]:
        """The texts of the validation or test split."""
        texts = self.data.of(split)
        count = len(texts) if self.held is None else min(self.held, len(texts))
        chosen = [texts[i * len(texts) // count] for i in range(count)]
        for start in range(0, count, size):
            yield self._made(chosen[start : start + size])

    def describe(self) -> str:
        """Name, sizes and digest of the data, and how it is cut."""
        data = self.data
        sizes = "/".join(str(len(part)) for part in (data.train, data.validation, data.test))
        least = f" found {self.least} times" if self.tokens == "words" else ""
        return (
            f"{data.title}, {sizes} texts, {self.classes} labels, sha256 {data.sha256[:12]}, "
            f"{self.tokens}{least}, {self.length} at most, {self.held or 'all'} of each split"
        )

    def ids(self, texts: Sequence[str]) -> list[int]:
        """The tokens of a text, or of several in one sequence."""
        parts = [self._ids(text) for text in texts]
        while sum(map(len, parts)) + len(parts) > self.length:
            max(parts, key=len).pop()
        found = [FIRST]
        for i, part in enumerate(parts):
            found += [SEPARATOR, *part] if i else part
        return found

    def _ids(self, text: str) -> list[int]:
        if self.tokens == "bytes":
            return [SPECIAL + byte for byte in text.encode()]
        return [self._words.get(word, UNKNOWN) for word in words(text)]

    @cached_property
    def _words(self) -> dict[str, int]:
        counts = Counter(w for example in self.data.train for t in example.texts for w in words(t))
        kept = sorted(word for word, count in counts.items() if count >= self.least)
        return {word: SPECIAL + i for i, word in enumerate(kept)}

    def _made(self, examples: list[Example]) -> Batch:
        rows = [torch.tensor(self.ids(example.texts)) for example in examples]
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
        labels: Tensor = torch.tensor([[example.label] for example in examples])
        return Batch(inputs, labels)


def words(text: str) -> list[str]:
    """Lower-case words, and marks by themselves."""
    return _WORD.findall(text.lower())
