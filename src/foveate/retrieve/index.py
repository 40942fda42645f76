"""An index that is read: its segments in memory maps, and the passages that answer a question.

Of the paper's workflows (section 4.3), each with the same scores in the end:

    refine        single vectors retrieve candidates, words refine them      (2, the one to use)
    words-first   the words' inverted index retrieves, all scores refine     (3, needs exact match)
    hybrid        both retrieve, each fills in the other's scores            (1)
    single        single vectors alone (4)        words     words alone (5)

The inverted index lists for each word id the places of its vectors. Without exact match every word
is compared with all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.methods.colberter import Encoding, mixed
from foveate.ops.errors import InputError, nearest
from foveate.retrieve import model as retrievers
from foveate.retrieve import segment
from foveate.retrieve.collection import Passage
from foveate.retrieve.files import DamagedError
from foveate.retrieve.model import Retriever
from foveate.retrieve.segment import Segment
from foveate.retrieve.storage import storage
from foveate.retrieve.writer import SEGMENTS, read_index

WORKFLOWS = ("refine", "words-first", "hybrid", "single", "words")


@dataclass(frozen=True)
class Match:
    """What one word of a question adds: `word` found `match` (None: no word) for `score`."""

    word: str
    match: str | None
    score: float


@dataclass(frozen=True)
class Hit:
    """A passage that was found.

    Attributes:
        passage: its text.
        score: by which hits are ranked.
        single, token: s_CLS and s_token; None if the workflow doesn't look.
        row: its place in the index.
    """

    passage: Passage
    score: float
    single: float | None
    token: float | None
    row: int


class Index:
    """An index, open for reading.

    Args:
        folder: of the index.
        check: compare each file with its checksum first; else with its size alone.
        device: of the encoder, which reads questions.

    Raises:
        InputError: there is none, it isn't finished, or its encoder isn't here.
        DamagedError: a file was changed since it was written.
    """

    def __init__(
        self, folder: str | Path, *, check: bool = True, device: torch.device | str = "cpu"
    ) -> None:
        self.folder = Path(folder).expanduser()
        for last in (False, False, True):
            self.entry = read_index(self.folder)
            try:
                self.segments = self._open(check)
                self.retriever = self._retriever(device)
                break
            except (FileNotFoundError, DamagedError) as error:
                # A writer may have put a new index in this one's place: then the list is another.
                if not last and read_index(self.folder) != self.entry:
                    continue
                if isinstance(error, DamagedError):
                    raise
                raise DamagedError(
                    f"{error.filename} is gone. Restore it from a copy, or build the index anew "
                    "with --fresh."
                ) from error
        firsts = [0]
        for one in self.segments:
            firsts.append(firsts[-1] + len(one))
        self.firsts = torch.tensor(firsts)
        self.alive = torch.cat([s.alive for s in self.segments] or [torch.zeros(0).bool()])
        self._postings: list[tuple[Tensor, Tensor] | None] = [None] * len(self.segments)

    def _open(self, check: bool) -> list[Segment]:
        settings, folder = self.entry["settings"], self.folder / SEGMENTS
        for entry in self.entry["segments"]:
            segment.check(folder, entry, content=check)
        return [
            segment.load(folder, entry, settings["single"], settings["width"])
            for entry in self.entry["segments"]
        ]

    def _retriever(self, device: torch.device | str) -> Retriever:
        settings = self.entry["settings"]
        folder = self.folder / settings["model"]
        if not folder.is_dir():
            raise FileNotFoundError(2, "no such folder", str(folder))
        if retrievers.sums(folder) != settings["files"]:
            raise DamagedError(
                f"{folder} is damaged: its checksums aren't those that were written. Restore it "
                "from a copy, or build the index anew with --fresh."
            )
        return retrievers.load(folder, device=device)

    def __len__(self) -> int:
        return int(self.alive.sum())

    @property
    def exact(self) -> bool:
        """Whether only equal words match."""
        return bool(self.entry["settings"]["exact"])

    def storage(self) -> dict[str, Any]:
        """Bytes a passage; see `foveate.retrieve.storage`."""
        model = self.retriever.model
        return storage(self.entry["segments"], model.recipe, model.head.dim)

    def rows_of(self) -> dict[str, int]:
        """By key the row of each passage."""
        rows = self.alive.nonzero()[:, 0].tolist()
        return {self.passage(row).key: row for row in rows}

    # -- questions --------------------------------------------------------------------------------
    @torch.no_grad()
    def ask(self, question: str) -> Encoding:
        """Encode a question.

        Raises:
            InputError: there is no word in it.
        """
        found = self.retriever.model([question], passage=False)
        if not found.real.any():
            raise InputError(f"The question {question!r} holds no word.")
        parts = (x.cpu() for x in (found.single, found.vectors, found.ids, found.real))
        return Encoding(*parts)

    def search(
        self, question: str, top: int = 10, workflow: str = "refine", candidates: int = 1000
    ) -> list[Hit]:
        """The passages that answer best, the best one first.

        Args:
            question: any text.
            top: how many.
            workflow: see above.
            candidates: how many each first stage retrieves.

        Raises:
            InputError: no such workflow, or it isn't for this index; no word in the question.
        """
        for name, value in (("top", top), ("candidates", candidates)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r}: expected an integer of 1 or more.")
        scores, single, token = self.scores(self.ask(question), workflow, candidates)
        best = scores.topk(min(top, len(scores)))
        return [
            Hit(
                self.passage(row), score, _told(single, row), _told(token, row), row,
            )
            for score, row in zip(best.values.tolist(), best.indices.tolist())
            if score > -math.inf
        ]  # fmt: skip

    def scores(
        self, query: Encoding, workflow: str = "refine", candidates: int = 1000
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(rows) each: the ranking score, s_CLS and s_token; -inf is not retrieved, not looked at.

        Raises:
            InputError: no such workflow, or it isn't for this index.
        """
        if workflow not in WORKFLOWS:
            raise InputError(f"No workflow {workflow!r}; {nearest(workflow, WORKFLOWS)}")
        if workflow == "words-first" and not self.exact:
            raise InputError(
                "words-first retrieves by the words' inverted index, which needs an index with "
                "exact match (foveate index --exact); without one use refine."
            )
        nothing = torch.full((len(self.alive),), -math.inf)
        if not len(nothing):
            return nothing, nothing, nothing
        single = token = nothing
        rows = torch.zeros(0, dtype=torch.long)
        if workflow in ("refine", "hybrid", "single"):
            every = self.single_scores(query).masked_fill(~self.alive, -math.inf)
            rows = _best(every, candidates if workflow != "single" else len(every))
            if workflow == "single":
                return every, every, nothing
        if workflow in ("words-first", "hybrid", "words"):
            every = self.word_scores(query).masked_fill(~self.alive, -math.inf)
            if workflow == "words":
                return every, nothing, every
            rows = torch.cat([rows, _best(every, candidates)]).unique()
        single = nothing.index_put((rows,), self.single_scores(query, rows))
        token = nothing.index_put((rows,), self.word_scores_of(query, rows))
        gamma = self.retriever.model.head.gamma.detach().cpu()
        both = nothing.index_put((rows,), mixed(single[rows], token[rows], gamma))
        return both, single, token

    def single_scores(self, query: Encoding, rows: Tensor | None = None) -> Tensor:
        """s_CLS of some rows, or of all."""
        q = query.single[0].float()
        if rows is None:
            return torch.cat([s.single.float() @ q for s in self.segments])
        parts = [s.single[at].float() @ q for s, at, _ in self._split(rows)]
        return self._joined(parts, rows)

    def word_scores_of(self, query: Encoding, rows: Tensor) -> Tensor:
        """s_token of some rows: their words against the question's."""
        parts = []
        for one, at, _ in self._split(rows):
            counts = one.starts[at + 1] - one.starts[at]
            owner = torch.arange(len(at)).repeat_interleave(counts)
            ends = counts.cumsum(0)
            inner = torch.arange(len(owner)) - (ends - counts)[owner]
            parts.append(self._words(query, one, one.starts[at][owner] + inner, owner, counts))
        return self._joined(parts, rows)

    def _words(
        self, query: Encoding, one: Segment, at: Tensor, owner: Tensor, counts: Tensor
    ) -> Tensor:
        """s_token of passages from their words `at`; `owner` is the passage of each."""
        q = query.vectors[0][query.real[0]].float()
        s = q @ one.vectors[at].float().T
        if self.exact:
            s = torch.where(query.ids[0][query.real[0]][:, None] == one.ids[at], s, 0.0)
        best = torch.full((len(q), len(counts)), -math.inf)
        best.scatter_reduce_(1, owner.expand(len(q), -1), s, "amax")
        return torch.where(counts > 0, best, 0.0).sum(0)

    def word_scores(self, query: Encoding) -> Tensor:
        """s_token of all rows; with exact match by the inverted index, -inf without a match."""
        if not self.exact:
            return self.word_scores_of(query, torch.arange(len(self.alive)))
        return torch.cat([self._inverted(query, n) for n in range(len(self.segments))])

    def _inverted(self, query: Encoding, number: int) -> Tensor:
        """Accumulate the postings of the question's words.

        A word's best match is its highest product among its own postings, or 0 where the passage
        has any other word.
        """
        one = self.segments[number]
        found = self._postings[number]
        if found is None:
            found = self._postings[number] = one.ids.sort(stable=True)
        ids, order = found
        counts = one.starts[1:] - one.starts[:-1]
        total, touched = torch.zeros(len(one)), torch.zeros(len(one), dtype=torch.bool)
        q = query.vectors[0][query.real[0]].float()
        asked = query.ids[0][query.real[0]]
        lows = torch.searchsorted(ids, asked)
        highs = torch.searchsorted(ids, asked, right=True)
        for vector, low, high in zip(q, lows.tolist(), highs.tolist()):
            at = order[low:high]
            owner = torch.searchsorted(one.starts, at, right=True) - 1
            owner, where, times = owner.unique(return_inverse=True, return_counts=True)
            best = torch.full((len(owner),), -math.inf)
            best.scatter_reduce_(0, where, one.vectors[at].float() @ vector, "amax")
            alone = times == counts[owner]
            total[owner] += torch.where(alone, best, best.clamp(min=0))
            touched[owner] = True
        return total.masked_fill(~touched, -math.inf)

    def _split(self, rows: Tensor) -> list[tuple[Segment, Tensor, Tensor]]:
        """By segment: the rows in it, counted from its first, and their places among `rows`."""
        of = torch.searchsorted(self.firsts, rows, right=True) - 1
        out = []
        for number, one in enumerate(self.segments):
            place = (of == number).nonzero()[:, 0]
            if len(place):
                out.append((one, rows[place] - self.firsts[number], place))
        return out

    def _joined(self, parts: list[Tensor], rows: Tensor) -> Tensor:
        out = torch.zeros(len(rows))
        for part, (_, _, place) in zip(parts, self._split(rows)):
            out[place] = part
        return out

    # -- what is shown ----------------------------------------------------------------------------
    def passage(self, row: int) -> Passage:
        """The text of a row."""
        number = int(torch.searchsorted(self.firsts, row, right=True)) - 1
        return self.segments[number].passage(row - int(self.firsts[number]))

    @torch.no_grad()
    def why(self, question: str, row: int) -> list[Match]:
        """Of each word of a question what it adds to s_token, and the word that it found.

        The scores' sum is s_token. Words are shown as they first stand in their text.
        """
        model = self.retriever.model
        query = self.ask(question)
        number = int(torch.searchsorted(self.firsts, row, right=True)) - 1
        one, at = self.segments[number], row - int(self.firsts[number])
        start, end = one.starts[at : at + 2].tolist()
        asks, says = (model.words.names(t) for t in (question, self.passage(row).text))
        ids = one.ids[start:end]
        q = query.vectors[0][query.real[0]].float()
        asked = query.ids[0][query.real[0]]
        s = q @ one.vectors[start:end].float().T
        same = asked[:, None] == ids
        if self.exact:
            s = torch.where(same, s, 0.0)
        out = []
        for products, word, equal in zip(s, asked.tolist(), same):
            name = asks.get(word, "?")
            if not len(ids):
                out.append(Match(name, None, 0.0))
                continue
            place = int(products.argmax())
            lost = model.recipe.exact and not bool(equal[place])
            match = None if lost else says.get(int(ids[place]), "?")
            out.append(Match(name, match, float(products[place])))
        return out


def _best(scores: Tensor, count: int) -> Tensor:
    best = scores.topk(min(count, len(scores)))
    return best.indices[best.values > -math.inf]


def _told(scores: Tensor, row: int) -> float | None:
    value = float(scores[row])
    return None if value == -math.inf else value
