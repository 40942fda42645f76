"""The prompts: real text with a pass key hidden in it, and the question for the key at the end.

One forward pass over such a prompt gives the prefill time, the quality on the real text's tokens
(the sentence with the key and the question are not counted), and by going on from its cache, the
decoding speed and whether the key is found.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.ops.errors import InputError

SENTENCE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nThe pass key is"
_SEARCH = 48


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts of one length.

    Attributes:
        ids: (B, L) int64.
        scored: (B, L) bool; True where the token at that place is real text that is predicted
            from real text, so counts for perplexity, KL and agreement.
        keys: what must be found, one per row; empty if nothing is hidden.
        depths: where it is hidden, as a share of the length; empty if nothing is.
    """

    ids: Tensor
    scored: Tensor
    keys: tuple[str, ...]
    depths: tuple[float, ...]


class PromptMaker:
    """Makes the prompts of a run from the tokens of a text.

    Args:
        tokenizer: transformers' tokenizer.
        tokens: (N,) int64, the text without special tokens.
        seed: whatever the keys shall depend on besides length and window (the text's digest).
        windows: how many prompts of each length there will be; they are spread over the text.
        depths: where to hide the key, as shares of the length; prompt i takes depth i mod n.
    """

    def __init__(
        self, tokenizer: Any, tokens: Tensor, *, seed: str, windows: int, depths: tuple[float, ...]
    ) -> None:
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.seed = seed
        self.windows = windows
        self.depths = depths
        self.head = _head(tokenizer)
        self.question = self._encode(QUESTION) if depths else []

    def shortest(self) -> int:
        """The shortest length at which real text is more than half of the prompt."""
        extra = len(self.head) + len(self.question)
        if self.depths:
            extra += len(self._encode(SENTENCE.format(key="12345")))
        return 2 * extra + 16

    def batch(self, length: int, first: int, size: int) -> Prompts:
        """Prompts number `first` to `first + size - 1` of a length."""
        rows = [self._one(length, (first + i) % self.windows) for i in range(size)]
        return Prompts(
            torch.tensor([row[0] for row in rows]),
            torch.tensor([row[1] for row in rows]),
            tuple(row[2] for row in rows if row[2]),
            tuple(row[3] for row in rows if row[2]),
        )

    def _one(self, length: int, window: int) -> tuple[list[int], list[bool], str, float]:
        key, needle, depth = "", [], 0.0
        if self.depths:
            depth = self.depths[window % len(self.depths)]
            key = self._key(length, window)
            needle = self._encode(SENTENCE.format(key=key))
        fill = length - len(self.head) - len(needle) - len(self.question)
        if fill < 2:
            raise InputError(
                f"A length of {length} tokens has no room for text beside the pass key and its "
                f"question; give at least --lengths {self.shortest()}."
            )
        spare = len(self.tokens) - fill
        if spare < 0:
            raise InputError(
                f"The text has {len(self.tokens)} tokens, too few for a length of {length}; give a "
                "longer --text or shorter --lengths."
            )
        start = round(spare * window / max(1, self.windows - 1)) if self.windows > 1 else 0
        text = self.tokens[start : start + fill].tolist()
        cut = self._sentence_end(text, round(depth * fill)) if needle else 0
        ids = self.head + text[:cut] + needle + text[cut:] + self.question
        scored = [False] * len(self.head) + [True] * cut + [False] * len(needle)
        scored += [True] * (fill - cut) + [False] * len(self.question)
        scored[0] = False
        after = len(self.head) + cut + len(needle)
        if needle and after < length:
            scored[after] = False
        return ids, scored, key, depth

    def _key(self, length: int, window: int) -> str:
        made = hashlib.sha256(f"{self.seed}:{length}:{window}".encode()).hexdigest()
        return str(10_000 + int(made[:12], 16) % 90_000)

    def _sentence_end(self, text: list[int], near: int) -> int:
        """The end of a sentence nearest to a place in the text, or that very place."""
        low, high = max(1, near - _SEARCH), min(len(text), near + _SEARCH)
        ends = [
            i
            for i in range(low, high)
            if self.tokenizer.decode([text[i - 1]]).endswith((".", "\n"))
        ]
        return min(ends, key=lambda i: abs(i - near), default=max(low, min(near, high)))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def tokenise(tokenizer: Any, text: str) -> Tensor:
    """(N,) int64: a text without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


def found(answer: str, key: str) -> bool:
    """Whether an answer has the key in it, digits that are grouped included."""
    return key in re.sub(r"(?<=\d)[ ,._](?=\d)", "", answer)


def _head(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, a BOS token mostly."""
    plain = list(tokenizer("a", add_special_tokens=False).input_ids)
    full = list(tokenizer("a").input_ids)
    for cut in range(len(full) - len(plain) + 1):
        if full[cut : cut + len(plain)] == plain:
            return full[:cut]
    return []
