"""BM25 by the library bm25s: what retrievers are held against, and where negatives come from."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.models.whole_words import porter
from foveate.ops.errors import InputError, MissingPackageError

_WORD = re.compile(r"\w+")
K1, B = 0.9, 0.4  # as Anserini has them, and BEIR's published figures


@dataclass(frozen=True)
class BM25:
    """An index of texts.

    Attributes:
        stem: words are stemmed by Porter's rules; lower-cased always.
    """

    stem: bool
    _found: Any = field(repr=False)

    @staticmethod
    def of(texts: Sequence[str], *, stem: bool = True, k1: float = K1, b: float = B) -> BM25:
        """Index texts.

        Raises:
            InputError: there are no texts, or no words in them.
            MissingPackageError: bm25s or snowballstemmer isn't installed.
        """
        if importlib.util.find_spec("bm25s") is None:
            raise MissingPackageError("BM25 needs bm25s: pip install 'foveate[retrieve]'")
        import bm25s

        made = [words(text, stem) for text in texts]
        if not any(made):
            raise InputError("BM25.of: expected texts with words in them.")
        found = bm25s.BM25(method="lucene", k1=k1, b=b)
        found.index(made, show_progress=False)
        return BM25(stem, found)

    def scores(self, text: str) -> Tensor:
        """(texts) float32, of a question."""
        known = [word for word in words(text, self.stem) if word in self._found.vocab_dict]
        if not known:
            return torch.zeros(self._found.scores["num_docs"])
        return torch.from_numpy(self._found.get_scores(known)).float()


def words(text: str, stem: bool) -> list[str]:
    """Runs of letters and digits, lower-cased."""
    found = _WORD.findall(text.lower())
    return [porter()(word) for word in found] if stem else found
