"""Real texts with labels: Banking77, which is shipped, and other sets from a folder that is given.

What isn't shipped may not be (SICK is non-commercial), or needn't be seen by everyone (GoEmotions
is profane). A folder holds the files under the names of their releases, plain or as `.xz`:

| name | files | a text's label |
| --- | --- | --- |
| banking77 | train.csv, test.csv | one of 77 intents of a bank's customers |
| goemotions | train.tsv, dev.tsv, test.tsv, labels.txt | one of 28 emotions (rows with one only) |
| sentiment | as goemotions | the paper's grouping: positive, negative, ambiguous, neutral |
| sick | train.tsv, trial.tsv, test.tsv | pairs: neutral, entailment, contradiction |
| snli | snli_dev.tsv, snli_test.tsv | pairs; trained on the dev split, tested on the test split |

Where a release has no validation split, every tenth training text (by a digest of it) is one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import lzma
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from foveate.ops.errors import InputError, nearest
from foveate.papers.tasks.base import Split
from foveate.runs.text import DATA

SHIPPED = "banking77"
_GROUPS = {
    "positive": "admiration amusement approval caring desire excitement gratitude joy love "
    "optimism pride relief",
    "negative": "anger annoyance disappointment disapproval disgust embarrassment fear grief "
    "nervousness remorse sadness",
    "ambiguous": "confusion curiosity realization surprise",
    "neutral": "neutral",
}


class Example(NamedTuple):
    """A text, or a pair of texts, and the index of its label."""

    texts: tuple[str, ...]
    label: int


@dataclass(frozen=True, eq=False)
class Labelled:
    """A data set that was read.

    Attributes:
        title: names it.
        labels: what the indices mean.
        train, validation, test: the examples, in the files' order.
        sha256: over all examples and labels.
    """

    title: str
    labels: tuple[str, ...]
    train: tuple[Example, ...] = field(repr=False)
    validation: tuple[Example, ...] = field(repr=False)
    test: tuple[Example, ...] = field(repr=False)

    @property
    def sha256(self) -> str:
        """Digest of all that is in it."""
        made = hashlib.sha256(repr(self.labels).encode())
        for split in (self.train, self.validation, self.test):
            made.update(repr(split).encode())
        return made.hexdigest()

    def of(self, split: Split) -> tuple[Example, ...]:
        """The examples of a split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


Row = tuple[tuple[str, ...], str]


def load(name: str = SHIPPED, folder: str | Path | None = None) -> Labelled:
    """Read a data set; see the table above.

    Args:
        name: of the set.
        folder: that holds its files; None is what is shipped, Banking77.

    Raises:
        InputError: no such set, it isn't shipped, or a file is missing or damaged.
    """
    if name not in _READERS:
        raise InputError(f"data set {name!r} is unknown; {nearest(name, tuple(_READERS))}")
    if folder is None and name != SHIPPED:
        raise InputError(
            f"{name} isn't shipped with foveate; give the folder that holds its files "
            f"({', '.join(FILES[name])}; plain or as .xz)."
        )
    return _load(name, DATA / SHIPPED if folder is None else Path(folder).expanduser())


@lru_cache(maxsize=8)
def _load(name: str, folder: Path) -> Labelled:
    texts = [read_file(folder, file) for file in FILES[name]]
    try:
        labels, train, validation, test = _READERS[name](*texts)
        if validation is None:
            held = [_tenth(row) for row in train]
            validation = [row for row, out in zip(train, held) if out]
            train = [row for row, out in zip(train, held) if not out]
        index = {label: i for i, label in enumerate(labels)}
        made = [
            tuple(Example(texts, index[label]) for texts, label in rows)
            for rows in (train, validation, test)
        ]
    except (AttributeError, csv.Error, IndexError, KeyError, ValueError) as error:
        raise InputError(
            f"{folder} doesn't hold {name} as it was released ({type(error).__name__}: {error})."
        ) from error
    return Labelled(name, labels, *made)


def read_file(folder: Path, name: str) -> str:
    """A file of a data set, plain or as `.xz`."""
    for path, unpack in ((folder / f"{name}.xz", True), (folder / name, False)):
        if path.is_file():
            try:
                content = path.read_bytes()
                return (lzma.decompress(content) if unpack else content).decode()
            except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
                raise InputError(f"{path} can't be read: {error}.") from error
    raise InputError(f"{folder} holds no {name} or {name}.xz; give the folder of the data set.")


def _tenth(row: Row) -> bool:
    """Whether a training text is held out for validation, from its words alone."""
    return hashlib.sha256("\n".join(row[0]).encode()).digest()[0] * 10 < 256


Read = tuple[tuple[str, ...], list[Row], list[Row] | None, list[Row]]


def _banking77(train: str, test: str) -> Read:
    def rows(text: str) -> list[Row]:
        found = csv.DictReader(io.StringIO(text, newline=""))
        return [((row["text"].strip(),), row["category"]) for row in found]

    labels = tuple(sorted({label for _, label in rows(train)}))
    return labels, rows(train), None, rows(test)


def _goemotions(train: str, dev: str, test: str, names: str) -> Read:
    labels = tuple(names.split())

    def rows(text: str) -> list[Row]:
        found = [line.split("\t") for line in text.split("\n") if line.strip()]
        return [((row[0],), labels[int(row[1])]) for row in found if "," not in row[1]]

    return labels, rows(train), rows(dev), rows(test)


def _sentiment(train: str, dev: str, test: str, names: str) -> Read:
    group = {label: name for name, labels in _GROUPS.items() for label in labels.split()}
    _, *splits = _goemotions(train, dev, test, names)
    some = [[(texts, group[label]) for texts, label in rows or []] for rows in splits]
    return tuple(_GROUPS), some[0], some[1], some[2]


def _pairs(text: str, first: str, second: str, label: str) -> list[Row]:
    found = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [((row[first], row[second]), row[label].lower()) for row in found]


_ENTAILMENT = ("contradiction", "neutral", "entailment")


def _sick(*texts: str) -> Read:
    columns = ("sentence_A", "sentence_B", "entailment_judgment")
    train, trial, test = (_pairs(text, *columns) for text in texts)
    return _ENTAILMENT, train, trial, test


def _snli(*texts: str) -> Read:
    dev, test = (_pairs(text, "premise", "hypothesis", "label") for text in texts)
    return _ENTAILMENT, dev, None, test


FILES = {
    "banking77": ("train.csv", "test.csv"),
    "goemotions": ("train.tsv", "dev.tsv", "test.tsv", "labels.txt"),
    "sentiment": ("train.tsv", "dev.tsv", "test.tsv", "labels.txt"),
    "sick": ("train.tsv", "trial.tsv", "test.tsv"),
    "snli": ("snli_dev.tsv", "snli_test.tsv"),
}
_READERS: dict[str, Callable[..., Read]] = {
    "banking77": _banking77,
    "goemotions": _goemotions,
    "sentiment": _sentiment,
    "sick": _sick,
    "snli": _snli,
}
