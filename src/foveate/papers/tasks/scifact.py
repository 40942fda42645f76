"""Claims and the abstracts that they cite, sentence by sentence: documents whose tree is known.

SciFact (Wadden et al. 2020, arXiv 2004.14974). What is shipped are the 300 test claims and the 283
abstracts that they cite; a folder that holds the whole release (`corpus.jsonl`, `claims.jsonl`,
plain or as `.xz`) is read likewise.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import generator
from foveate.papers.tasks.labelled import read_file
from foveate.runs.text import DATA


@dataclass(frozen=True, eq=False)
class SciFact:
    """Claims of one split, and abstracts.

    Attributes:
        abstracts: (title, sentence, sentence, ...) of each.
        claims: of which `cited` lists the abstracts, by index.
    """

    abstracts: tuple[tuple[str, ...], ...] = field(repr=False)
    claims: tuple[str, ...] = field(repr=False)
    cited: tuple[frozenset[int], ...] = field(repr=False)

    def describe(self) -> str:
        """Sizes and digest."""
        made = hashlib.sha256(repr((self.abstracts, self.claims)).encode()).hexdigest()
        return (
            f"SciFact, {len(self.claims)} claims on {len(self.abstracts)} abstracts, sha256 "
            f"{made[:12]}"
        )

    def drawn(self, count: int, seed: int) -> SciFact:
        """Some of the abstracts, and the claims that cite one of them."""
        order = torch.randperm(len(self.abstracts), generator=generator("scifact", seed))
        place = {at: i for i, at in enumerate(order[:count].tolist())}
        kept = [frozenset(place[at] for at in cited if at in place) for cited in self.cited]
        return SciFact(
            tuple(self.abstracts[at] for at in place),
            tuple(claim for claim, cited in zip(self.claims, kept) if cited),
            tuple(cited for cited in kept if cited),
        )


@lru_cache(maxsize=2)
def load_scifact(folder: str | Path | None = None) -> SciFact:
    """The test claims and the abstracts that are there.

    Args:
        folder: of the release; None is what is shipped.

    Raises:
        InputError: a file is missing or damaged.
    """
    where = DATA / "scifact" if folder is None else Path(folder).expanduser()
    try:
        corpus, claims = (_lines(where, name) for name in ("corpus.jsonl", "claims.jsonl"))
        place = {int(row["_id"]): i for i, row in enumerate(corpus)}
        asked = [row for row in claims if row["split"] == "test" and row["cited"]]
        return SciFact(
            tuple((row["title"], *row["sentences"]) for row in corpus),
            tuple(row["text"] for row in asked),
            tuple(frozenset(place[int(at)] for at in row["cited"]) for row in asked),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where} doesn't hold SciFact as it was released ({type(error).__name__}: {error})."
        ) from error


def _lines(folder: Path, name: str) -> list[Any]:
    return [json.loads(line) for line in read_file(folder, name).split("\n") if line]
