"""Triples that a retriever learns from, made of the documents themselves, and their teacher.

A question is a document's title, or its first sentence; what answers it is the rest of the same
document, and what doesn't are documents that BM25 ranks high. Parts of one file share its title,
and all of them answer it; a title that all documents share asks nothing. Judged questions are taken
too, where there are any, with the documents that were judged to answer them. The teacher scores
both by the encoder's own states, before any reduction:

    T = MaxSim over whole words, by cosine, in full width        + lexical * BM25

each part in units of its margins' standard deviation; margins of T then have `spread` as theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from foveate.methods.colberter import token_score
from foveate.models.colberter import ColberterModel
from foveate.ops.errors import InputError
from foveate.retrieve.bank import Bank, Some, raw_encoder
from foveate.retrieve.bm25 import BM25
from foveate.retrieve.collection import Judged, Passage

_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def question_of(passage: Passage) -> tuple[str, int]:
    """A passage's own question, and the characters of its text that it takes up; ("", 0) if none.

    The title, if something stands behind it; else the first of several sentences.
    """
    if passage.title.strip() and passage.body.strip():
        return passage.title, len(passage.text) - len(passage.body)
    return _sentence_of(passage)


def _sentence_of(passage: Passage) -> tuple[str, int]:
    """Likewise, the first of the body's sentences, with the title before it."""
    first, rest = [*_SENTENCE.split(passage.body, maxsplit=1), ""][:2]
    return (first, len(passage.text) - len(rest)) if first.strip() and rest.strip() else ("", 0)


@dataclass(frozen=True)
class Triples:
    """Of a batch.

    Attributes:
        query, better, worse: the texts.
        margin: (B), T+ - T-.
    """

    query: Some
    better: Some
    worse: Some
    margin: Tensor

    def to(self, device: torch.device | str) -> Triples:
        """On another device."""
        query, better, worse = (x.to(device) for x in (self.query, self.better, self.worse))
        return Triples(query, better, worse, self.margin.to(device))


@dataclass(frozen=True)
class Lessons:
    """Questions with their answers and hard negatives.

    Attributes:
        questions, passages: encoded.
        pairs: (question, passage that answers it).
        negatives: (pairs, k) passages that don't, as BM25 ranks them.
        lexical: (pairs, 1 + k) BM25 of the answer and of these.
        skip: (passages) characters that a passage's own question takes up.
        own: (pairs) whether the question is of a document itself, whose question part is left out.
        weight: of BM25 in the teacher.
        units: standard deviations of MaxSim's and BM25's margins, and of T's.
        spread: of the margins.
    """

    questions: Bank
    passages: Bank
    pairs: tuple[tuple[int, int], ...] = field(repr=False)
    negatives: Tensor = field(repr=False)
    lexical: Tensor = field(repr=False)
    skip: tuple[int, ...] = field(repr=False)
    own: tuple[bool, ...] = field(repr=False)
    weight: float = 1.0
    units: tuple[float, float, float] = (1.0, 1.0, 1.0)
    spread: float = 3.0
    _margins: dict[tuple[int, ...], Tensor] = field(default_factory=dict, compare=False, repr=False)

    def batch(self, seed: int, number: int, size: int) -> Triples:
        """Batch `number`: the same for the same seed."""
        draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
        at = torch.randint(len(self.pairs), (size,), generator=draw)
        which = torch.randint(self.negatives.shape[1], (size,), generator=draw)
        return self._triples(at.tolist(), which)

    def _triples(self, at: list[int], which: Tensor) -> Triples:
        worse = self.negatives[at, which].tolist()
        better = [self.pairs[i][1] for i in at]

        def cut(texts: list[int]) -> list[int]:
            return [self.skip[p] if self.own[i] else 0 for i, p in zip(at, texts)]

        query = self.questions.some([self.pairs[i][0] for i in at])
        up, down = (self.passages.some(p, cut(p)) for p in (better, worse))
        known = (*at, *which.tolist())
        if (margin := self._margins.get(known)) is None:
            margin = self._margins[known] = self._margin(query, up, down, at, which)
        return Triples(query, up, down, margin)

    def _margin(self, query: Some, up: Some, down: Some, at: list[int], which: Tensor) -> Tensor:
        raw = raw_encoder(whole=True)
        with torch.no_grad():
            q = raw(query, False)
            soft = token_score(q, raw(up, True)) - token_score(q, raw(down, True))
        hard = self.lexical[at, 0] - self.lexical[at, 1 + which]
        margin = soft / self.units[0] + self.weight * hard / self.units[1]
        return self.spread * margin / self.units[2]

    @staticmethod
    def of(
        model: ColberterModel,
        passages: Sequence[Passage],
        bank: Bank | None = None,
        judged: Judged | None = None,
        *,
        negatives: int = 30,
        weight: float = 1.0,
        spread: float = 3.0,
        tell: Callable[[float], None] = lambda share: None,
    ) -> Lessons:
        """Make them.

        Args:
            model: whose encoder gives the states.
            passages: that ask and answer.
            bank: they, encoded; None encodes them.
            judged: more questions.
            negatives: of each question.
            weight, spread: of the teacher.

        Raises:
            InputError: there are fewer than two questions, or fewer than two passages.
        """
        if len(passages) < 2:
            raise InputError("Training needs two documents or more; give a trained retriever.")
        if len({p.title for p in passages}) == 1:
            found = [_sentence_of(p) for p in passages]
        else:
            found = [question_of(p) for p in passages]
        asked = [(text, i, True) for i, (text, _) in enumerate(found) if text]
        place = {p.key: i for i, p in enumerate(passages)}
        if judged is not None:
            for text, gains in zip(judged.texts, judged.gains):
                asked += [(text, place[key], False) for key in gains if key in place]
        answers: dict[str, set[int]] = {}
        for text, answer, _ in asked:
            answers.setdefault(text, set()).add(answer)
        asked = [one for one in asked if len(answers[one[0]]) < len(passages)]
        if len(asked) < 2:
            raise InputError(
                "The documents ask too little to train on: expected titles, or several sentences "
                "each; give a trained retriever."
            )
        texts = list(dict.fromkeys(text for text, _, _ in asked))
        number = {text: i for i, text in enumerate(texts)}
        bodies = [p.text[skip:] for p, (_, skip) in zip(passages, found)]
        k = min(negatives, len(passages) - 1)
        theirs = [answers[text] for text in texts]
        near, lexical = _negatives(BM25.of(bodies), texts, asked, number, theirs, k)
        lessons = Lessons(
            Bank.of(model, texts, lambda share: tell(0.3 * share)),
            bank or Bank.of(model, [p.text for p in passages], lambda s: tell(0.3 + 0.7 * s)),
            tuple((number[text], answer) for text, answer, _ in asked),
            near, lexical, tuple(skip for _, skip in found), tuple(own for _, _, own in asked),
            weight, spread=spread,
        )  # fmt: skip
        return lessons._measured()

    def _measured(self) -> Lessons:
        """With units taken from some triples."""

        def margins(lessons: Lessons) -> Tensor:
            return torch.cat([lessons.batch(-1 - n, n, 32).margin for n in range(8)])

        parts = [margins(replace(self, weight=0.0, units=(1.0, 1.0, 1.0), spread=1.0, _margins={}))]
        parts.append(self.lexical[:, :1].sub(self.lexical[:, 1:]).flatten())
        soft, hard = (max(float(x.std()), 1e-6) for x in parts)
        scaled = replace(self, units=(soft, hard, 1.0), spread=1.0, _margins={})
        whole = max(float(margins(scaled).std()), 1e-6)
        return replace(self, units=(soft, hard, whole), _margins={})


def _negatives(
    bm25: BM25,
    texts: Sequence[str],
    asked: Sequence[tuple[str, int, bool]],
    number: dict[str, int],
    answers: Sequence[set[int]],
    k: int,
) -> tuple[Tensor, Tensor]:
    """For each pair the passages that BM25 ranks highest but don't answer, and their scores.

    Where fewer than k don't answer, these are repeated.
    """
    near: list[Tensor] = []
    own: list[dict[int, float]] = []
    for i, text in enumerate(texts):
        scores = bm25.scores(text)
        own.append({at: float(scores[at]) for at in answers[i]})
        scores[list(answers[i])] = -1.0
        count = min(k, len(scores) - len(answers[i]))
        best, again = scores.topk(count), torch.arange(k) % count
        near.append(torch.stack([best.indices[again].float(), best.values[again]]))
    ids = torch.stack([near[number[text]][0] for text, _, _ in asked]).long()
    scores_of = torch.stack([near[number[text]][1] for text, _, _ in asked])
    mine = torch.tensor([own[number[text]][answer] for text, answer, _ in asked])
    lexical = torch.cat([mine[:, None], scores_of], 1)
    return ids, lexical
