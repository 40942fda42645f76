"""Real text to fit on: windows of it, and windows with something hidden that the end asks for.

Half of each batch is prose, where every token counts; the other half hides a number in prose and
asks for it at the end, where only the answer counts. Training and judging read different parts of
the text, and batch i is a function of i and the seed alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.parts.fitting import Batch

# What is hidden, and what asks for it.
FORMS = (
    ("\n\nThe secret number is {key}. Remember it: {key}.\n\n", "\n\nThe secret number is"),
    ("\n\nNote: the access code of the archive is {key}.\n\n",
     "\n\nThe access code of the archive is"),
    ("\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n", "\n\nThe pass key is"),
)  # fmt: skip
HELD_OUT = 0.2
_FAR = 0.7  # hidden in this first share of the text, so that it is far from the question


@dataclass(frozen=True)
class TextBatches:
    """Batches of real text; `foveate.parts.fitting.Batches`.

    Attributes:
        tokenizer: transformers' tokenizer.
        tokens: (N,) int64, the text.
        length: tokens of a sequence.
        size: sequences of a batch; of an odd number one more is prose.
        seed: of windows, keys and places.
        judged: batches that judge.
        title: of the text.
    """

    tokenizer: Any
    tokens: Tensor
    length: int
    size: int = 2
    seed: int = 0
    judged: int = 4
    title: str = "text"

    def __post_init__(self) -> None:
        need = 2 * self.length
        held = int(len(self.tokens) * HELD_OUT)
        if self.length < 64 or self.size < 1 or self.judged < 1:
            raise InputError(
                f"A fit needs sequences of 64 tokens or more, and at least one in a batch; got "
                f"{self.length} and {self.size}."
            )
        if held < need:
            raise InputError(
                f"The text has {len(self.tokens):,} tokens; for sequences of {self.length:,} a fit "
                f"needs {int(need / HELD_OUT):,}. Give a longer text or a shorter length."
            )

    def train(self, number: int) -> Batch:
        """Batch `number` of the first four fifths of the text."""
        cut = int(len(self.tokens) * (1 - HELD_OUT))
        return self._batch(self.tokens[:cut], f"{self.seed}:train:{number}")

    def held_out(self) -> list[Batch]:
        """The batches of the last fifth."""
        cut = int(len(self.tokens) * (1 - HELD_OUT))
        rest = self.tokens[cut:]
        return [self._batch(rest, f"{self.seed}:held out:{i}") for i in range(self.judged)]

    def describe(self) -> str:
        """Title, digest, and how it is cut."""
        digest = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()[:16]
        return (
            f"{self.title} ({digest}), {self.size} sequences of {self.length} tokens, "
            f"seed {self.seed}"
        )

    def _batch(self, text: Tensor, name: str) -> Batch:
        digest = hashlib.sha256(name.encode()).digest()
        random = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows = [
            self._hidden(text, random) if i % 2 else self._prose(text, random)
            for i in range(self.size)
        ]
        return Batch(
            torch.stack([row[0] for row in rows]),
            torch.stack([row[1] for row in rows]),
            tuple("retrieval" if i % 2 else "prose" for i in range(self.size)),
            tuple(row[2] for row in rows),
        )

    def _prose(self, text: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, int]:
        ids = _window(text, self.length, random)
        scored = torch.ones(self.length, dtype=torch.bool)
        scored[0] = False
        return ids, scored, self.length

    def _hidden(self, text: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, int]:
        sentence, question = FORMS[_draw(len(FORMS), random)]
        key = str(10_000 + _draw(90_000, random))
        needle, asked = self._encode(sentence.format(key=key)), self._encode(question)
        answer = self._encode(f" {key}")
        fill = self.length - len(needle) - len(asked) - len(answer)
        if fill < 16:
            raise InputError(
                f"Sequences of {self.length} tokens have no room for a hidden number; give a "
                "greater length."
            )
        prose = _window(text, fill, random)
        at = _draw(max(1, int(fill * _FAR)), random)
        ids = torch.cat((prose[:at], needle, prose[at:], asked, answer))
        scored = torch.zeros(self.length, dtype=torch.bool)
        scored[self.length - len(answer) :] = True
        return ids, scored, self.length - len(answer)

    def _encode(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor(list(ids), dtype=torch.int64)


def _window(text: Tensor, length: int, random: torch.Generator) -> Tensor:
    start = _draw(len(text) - length, random)
    return text[start : start + length]


def _draw(most: int, random: torch.Generator) -> int:
    return int(torch.randint(most, (1,), generator=random))
