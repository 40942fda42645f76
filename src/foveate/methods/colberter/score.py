"""ColBERTer's scores: the single vectors' product, the words' sum of maxima, and their mixture.

    s_CLS   = q_CLS . p_CLS
    s_token = sum_j max_i q^_j . p^_i          i over the passage's words, j over the query's
    s       = sigmoid(gamma) s_CLS + (1 - sigmoid(gamma)) s_token

With exact match the product of two words with different ids counts as 0: a query word that isn't in
the passage adds 0, and a negative product loses to the 0 of any other word. Products are plain, no
vector is normalised; sums and maxima are in float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops.errors import InputError


@dataclass(frozen=True)
class Encoding:
    """Texts, encoded: what an index keeps of them.

    Attributes:
        single: (B, d_c), one vector for each text.
        vectors: (B, n, d), one for each word.
        ids: (B, n) int64, of the words.
        real: (B, n) bool, which words count.
        gates: (B, n), of the contextual stopwords; None for queries and without gates.
    """

    single: Tensor
    vectors: Tensor
    ids: Tensor
    real: Tensor
    gates: Tensor | None = None

    def __len__(self) -> int:
        return len(self.single)

    def rows(self, at: Tensor) -> Encoding:
        """Some of the texts."""
        gates = None if self.gates is None else self.gates[at]
        return Encoding(self.single[at], self.vectors[at], self.ids[at], self.real[at], gates)


def word_products(query: Encoding, passage: Encoding, *, exact: bool) -> Tensor:
    """q^_j . p^_i of all words, in pairs of texts.

    Args:
        query: (B, m, d) or one that broadcasts to it.
        passage: (B, n, d) likewise.
        exact: count only words with equal ids.

    Returns:
        (B, m, n); the lowest number where the passage has no such word.
    """
    q, p = query.vectors, passage.vectors
    if q.shape[-1] != p.shape[-1]:
        raise InputError(
            f"The query's words have {q.shape[-1]} numbers, the passage's {p.shape[-1]}; encode "
            "both with one model."
        )
    wide = torch.promote_types(torch.promote_types(q.dtype, p.dtype), torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        s = q.to(wide) @ p.to(wide).transpose(-1, -2)
    if exact:
        s = torch.where(query.ids[..., :, None] == passage.ids[..., None, :], s, 0.0)
    return s.masked_fill(~passage.real[..., None, :], torch.finfo(wide).min)


def best_matches(query: Encoding, passage: Encoding, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Of each query word: what it adds to s_token, and the passage word that it comes from.

    Shapes as in `word_products`.

    Returns:
        values (B, m) and places (B, m). A query word of padding, or a passage without words, adds
        0; so does, with exact match, a word that isn't in the passage: its place is that of a word
        with another id.
    """
    best = word_products(query, passage, exact=exact).max(-1)
    there = passage.real.any(-1)[..., None] & query.real
    return torch.where(there, best.values, 0.0), best.indices


def token_score(query: Encoding, passage: Encoding, *, exact: bool = False) -> Tensor:
    """s_token of pairs of texts: (B); shapes as in `word_products`."""
    return best_matches(query, passage, exact=exact)[0].sum(-1)


def single_score(query: Encoding, passage: Encoding) -> Tensor:
    """s_CLS of pairs of texts: (B)."""
    wide = torch.promote_types(query.single.dtype, torch.float32)
    return (query.single.to(wide) * passage.single.to(wide)).sum(-1)


def mixed(single: Tensor, token: Tensor, gamma: Tensor) -> Tensor:
    """sigma(gamma) s_CLS + (1 - sigma(gamma)) s_token."""
    weight = torch.sigmoid(gamma.to(single.dtype))
    return weight * single + (1 - weight) * token
