"""Texts with the states that a frozen encoder gives them, kept for heads to be trained on.

States are float16, in one tensor without padding. A text can be read from some character on, as if
what stands before weren't part of it (its states were made with it): a title that asks for its own
document isn't found by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foveate.methods.colberter import Bags, ColberterHead, Encoding, aggregate
from foveate.models.colberter import ColberterModel
from foveate.models.whole_words import Tokens
from foveate.ops.errors import InputError


@dataclass(frozen=True)
class Some:
    """Texts of a batch: states (B, L, H), which tokens are real (B, L), both kinds of bags."""

    tokens: tuple[Tokens, ...]
    states: Tensor
    real: Tensor
    whole: Bags
    parts: Bags

    def to(self, device: torch.device | str) -> Some:
        """On another device."""
        both = (self.whole, self.parts)
        whole, parts = (Bags(b.ids.to(device), b.place.to(device)) for b in both)
        return Some(self.tokens, self.states.to(device), self.real.to(device), whole, parts)

    def bags(self, whole: bool) -> Bags:
        """Of whole words, or of sub-words."""
        return self.whole if whole else self.parts


@dataclass(frozen=True)
class Bank:
    """Texts, encoded.

    Attributes:
        tokens: of each text, with bags of whole words.
        states: (all tokens, H) float16.
        starts: (texts + 1), where each text's begin.
    """

    tokens: tuple[Tokens, ...] = field(repr=False)
    states: Tensor = field(repr=False)
    starts: Tensor = field(repr=False)

    @staticmethod
    def of(
        model: ColberterModel,
        texts: Sequence[str],
        tell: Callable[[float], None] = lambda share: None,
        batch: int = 32,
    ) -> Bank:
        """Encode texts.

        Raises:
            InputError: the model's tokenizer makes no whole words.
        """
        if not model.words.whole or not texts:
            raise InputError("Bank.of: expected texts, and a model with whole words.")
        tokens = model.words(texts)
        lengths = torch.tensor([len(one.ids) for one in tokens])
        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        states = torch.zeros(int(starts[-1]), model.head.dim, dtype=torch.float16)
        order = lengths.argsort(stable=True).tolist()
        with torch.no_grad():
            for start in range(0, len(order), batch):
                at = order[start : start + batch]
                made, real = model.states([tokens[i] for i in at])
                for row, i in enumerate(at):
                    states[starts[i] : starts[i + 1]] = made[row, real[row]].half().cpu()
                tell((start + len(at)) / len(order))
        return Bank(tuple(tokens), states, starts)

    def __len__(self) -> int:
        return len(self.tokens)

    def some(self, at: Sequence[int], skip: Sequence[int] | None = None) -> Some:
        """Texts for a batch.

        Args:
            at: which.
            skip: for each the characters that are left out at its beginning.
        """
        states = nn.utils.rnn.pad_sequence(
            [self.states[self.starts[i] : self.starts[i + 1]].float() for i in at],
            batch_first=True,
        )
        lengths = self.starts[torch.tensor(at) + 1] - self.starts[torch.tensor(at)]
        real = torch.arange(states.shape[1]) < lengths[:, None]
        whole = Bags.of([self.tokens[i].words for i in at], states.shape[1])
        if skip is not None and any(skip):
            for row, (i, chars) in enumerate(zip(at, skip)):
                spans = self.tokens[i].spans
                out = [t for t, span in enumerate(spans) if span[0] < span[1] <= chars]
                real[row, out] = False
                whole.place[row, out] = -1
            seen = torch.zeros(len(at), whole.ids.shape[1] + 1, dtype=torch.bool)
            seen.scatter_(1, torch.where(whole.place < 0, whole.ids.shape[1], whole.place), True)
            whole = Bags(torch.where(seen[:, :-1], whole.ids, 0), whole.place)
        tokens = tuple(self.tokens[i] for i in at)
        return Some(tokens, states, real, whole, _parts(whole, tokens))

    def batches(self, size: int = 64) -> Iterator[tuple[list[int], Some]]:
        """All texts, short ones together."""
        order = (self.starts[1:] - self.starts[:-1]).argsort(stable=True).tolist()
        for start in range(0, len(order), size):
            at = order[start : start + size]
            yield at, self.some(at)


def _parts(whole: Bags, tokens: Sequence[Tokens]) -> Bags:
    """Every sub-word that belongs to a word as a word of its own."""
    inside = whole.place >= 0
    place = torch.where(inside, inside.cumsum(1) - 1, -1)
    most = max(1, int(inside.sum(1).max()))
    ids = torch.zeros(len(tokens), most, dtype=torch.long)
    for row, one in enumerate(tokens):
        own = torch.tensor(one.ids)[inside[row, : len(one.ids)]]
        ids[row, : len(own)] = own
    return Bags(ids, place)


def head_encoder(head: ColberterHead) -> Callable[[Some, bool], Encoding]:
    """Encodes texts of a bank with a head."""

    def encode(some: Some, passage: bool) -> Encoding:
        bags = some.bags(head.recipe.whole_words)
        return head(some.states, bags, some.real, passage=passage)

    return encode


def raw_encoder(whole: bool, mean: Tensor | None = None) -> Callable[[Some, bool], Encoding]:
    """Encodes without a head: states as they are, of length 1, and their mean.

    Args:
        whole: one vector for each whole word; else for each sub-word.
        mean: (H), taken off all of a text's word states first; None takes nothing off.
    """

    def encode(some: Some, passage: bool) -> Encoding:
        bags = some.bags(whole)
        states = some.states if mean is None else some.states - mean
        vectors = nn.functional.normalize(aggregate(states, bags), dim=-1)
        kept = torch.where(some.real[..., None], some.states, 0.0).sum(1)
        single = nn.functional.normalize(kept, dim=-1)
        return Encoding(single, vectors, bags.ids, bags.real)

    return encode


@torch.no_grad()
def all_scores(
    encode: Callable[[Some, bool], Encoding],
    questions: Bank,
    passages: Bank,
    *,
    exact: bool = False,
    size: int = 64,
    tell: Callable[[float], None] = lambda share: None,
) -> tuple[Tensor, Tensor, float]:
    """s_CLS and s_token of all questions and all passages.

    Returns:
        Both (questions, passages), and the mean number of words that a passage keeps.
    """
    asked, owner, ids, singles = [], [], [], torch.zeros(0)
    for at, some in questions.batches(256):
        found = encode(some, False)
        if not len(singles):
            singles = torch.zeros(len(questions), found.single.shape[1])
        singles[at] = found.single
        asked.append(found.vectors[found.real])
        ids.append(found.ids[found.real])
        owner.append(torch.tensor(at)[:, None].expand_as(found.real)[found.real])
    q, q_ids, rows = torch.cat(asked), torch.cat(ids), torch.cat(owner)
    single, token = torch.zeros(2, len(questions), len(passages)).unbind(0)
    kept = done = 0
    for at, some in passages.batches(size):
        found = encode(some, True)
        single[:, at] = singles @ found.single.T
        n, d = found.vectors.shape[1:]
        s = (q @ found.vectors.reshape(-1, d).T).view(len(q), len(at), n)
        if exact:
            s = torch.where(q_ids[:, None, None] == found.ids, s, 0.0)
        best = s.masked_fill_(~found.real, torch.finfo(s.dtype).min).amax(-1)
        best[:, ~found.real.any(1)] = 0.0
        token[:, at] = torch.zeros(len(questions), len(at)).index_add(0, rows, best)
        kept += int(found.real.sum())
        done += len(at)
        tell(done / len(passages))
    return single, token, kept / len(passages)
