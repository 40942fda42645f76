"""ColBERTer's bag of whole words (BOW^2): which sub-words make up which word, and its id.

Hofstätter et al. 2022, arXiv 2203.13088, section 3.2. A text is tokenised twice: into sub-words for
the encoder, and into whole words at blanks and punctuation marks. Each word is normalised (lower
case, stemmed); equal normalised words are one word of the bag. Its id is

    id(w) = the first 4 bytes of sha256(w) as an unsigned little-endian integer,  0 -> 1

so that bags of separate texts match without a common vocabulary; 0 stands for padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops.errors import InputError

Span = tuple[int, int]


def word_id(word: str) -> int:
    """The id of a normalised word: 1 to 2**32 - 1."""
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little") or 1


@dataclass(frozen=True)
class Words:
    """The bag of one text.

    Attributes:
        ids: of its words in order of first appearance.
        place: for each sub-word the index of its word in `ids`, -1 for none (special tokens).
        texts: the normalised words.
    """

    ids: tuple[int, ...]
    place: tuple[int, ...]
    texts: tuple[str, ...] = ()

    @property
    def word_map(self) -> list[int]:
        """For each sub-word the id of its word, 0 for none: the form of the paper's code."""
        return [self.ids[at] if at >= 0 else 0 for at in self.place]


def whole_words(
    tokens: Sequence[Span | None],
    words: Sequence[tuple[str, Span]],
    normalise: Callable[[str], str] = str.lower,
    *,
    numbered: bool = False,
) -> Words:
    """Put sub-words into the words that hold them.

    Args:
        tokens: for each sub-word where it stands in the text, (first character, one past the last);
            None for a special token. In ascending order. A sub-word may begin with the blanks
            before its word, as SentencePiece has it.
        words: the text's words and where they stand, in ascending order.
        normalise: makes words equal that count as one.
        numbered: number the words 1, 2, ... by first appearance instead of hashing them; for
            looking at.

    Returns:
        The bag. A word whose sub-words were all cut off isn't in it.
    """
    ids: dict[int, int] = {}
    numbers: dict[str, int] = {}
    texts: list[str] = []
    place: list[int] = []
    at = 0
    for span in tokens:
        if span is None or span[0] == span[1]:
            place.append(-1)
            continue
        while at < len(words) and words[at][1][1] <= span[0]:
            at += 1
        if at == len(words) or words[at][1][0] >= span[1]:
            place.append(-1)
            continue
        text = normalise(words[at][0])
        found = numbers.setdefault(text, len(numbers) + 1) if numbered else word_id(text)
        if found not in ids:
            ids[found] = len(ids)
            texts.append(text)
        place.append(ids[found])
    return Words(tuple(ids), tuple(place), tuple(texts))


def sub_words(vocabulary: Sequence[int], special: Sequence[bool]) -> Words:
    """Every sub-word a word of its own, its vocabulary number the id: ColBERT's bag (or COIL's)."""
    ids: list[int] = []
    place: list[int] = []
    for number, skip in zip(vocabulary, special):
        place.append(-1 if skip else len(ids))
        if not skip:
            ids.append(int(number))
    return Words(tuple(ids), tuple(place))


@dataclass(frozen=True)
class Bags:
    """Bags of a batch.

    Attributes:
        ids: (B, n) int64, 0 where a text has fewer words.
        place: (B, L) int64, the word of each sub-word; -1 for none.
    """

    ids: Tensor
    place: Tensor

    @staticmethod
    def of(words: Sequence[Words], length: int | None = None, device: str = "cpu") -> Bags:
        """Pad to the longest bag, and to `length` sub-words (default: the longest text's)."""
        if not words:
            raise InputError("Bags.of: expected at least one text.")
        longest = max(len(one.place) for one in words)
        length = longest if length is None else length
        if length < longest:
            raise InputError(f"Bags.of: a text has {longest} sub-words, more than {length}.")
        most = max(1, *(len(one.ids) for one in words))
        return Bags(
            torch.tensor([[*w.ids, *[0] * (most - len(w.ids))] for w in words], device=device),
            torch.tensor(
                [[*w.place, *[-1] * (length - len(w.place))] for w in words], device=device
            ),
        )

    @property
    def real(self) -> Tensor:
        """(B, n) bool, which words are there."""
        return self.ids > 0


def aggregate(x: Tensor, bags: Bags) -> Tensor:
    """The mean over each word's sub-words, of all its occurrences.

        p^_w = 1/|w| sum over {i: map(i) = w} of p._i

    Args:
        x: (B, L, d), of each sub-word.
        bags: of the same texts.

    Returns:
        (B, n, d), zero where there is no word. Sums are in float32 at least.

    Raises:
        InputError: the shapes don't fit.
    """
    if x.dim() != 3 or x.shape[:2] != bags.place.shape:
        raise InputError(
            f"aggregate: x has shape {tuple(x.shape)}, the bags' map {tuple(bags.place.shape)}; "
            "expected (B, L, d) and (B, L)."
        )
    batch, n = bags.ids.shape
    wide = x if x.dtype == torch.float64 else x.float()
    index = torch.where(bags.place < 0, n, bags.place)
    ones = torch.ones_like(index, dtype=wide.dtype)
    counts = wide.new_zeros(batch, n + 1).scatter_add(1, index, ones)
    inside = (bags.place >= 0)[..., None]
    sums = wide.new_zeros(batch, n + 1, x.shape[2]).scatter_add(
        1, index[..., None].expand_as(wide), torch.where(inside, wide, 0.0)
    )
    return (sums[:, :n] / counts[:, :n, None].clamp(min=1)).to(x.dtype)
