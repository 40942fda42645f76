"""What is searched: documents of a folder, and judged questions.

A folder holds either `corpus.jsonl` (or `.jsonl.xz`), one object a line with `_id`, `title` and
`text` (or a list of `sentences`), as BEIR's collections have it; or text files (`*.txt`, `*.md`, at
any depth), which are cut into passages at blank lines.

`scifact` names the collection that is shipped (5,183 abstracts, claims as questions).

Judged questions are `queries.jsonl` (or `claims.jsonl`) with `_id` and `text`, and
`qrels/<split>.tsv` (or `qrels_<split>.tsv`): a line of names, then question, document, gain.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.ops.errors import InputError
from foveate.runs.text import DATA

SUFFIXES = (".txt", ".md")
SHIPPED = {"scifact": "scifact/collection"}
_BLANK = re.compile(r"\n[ \t\r]*\n\s*")


@dataclass(frozen=True)
class Passage:
    """What is found: a document, or a part of a long one.

    Attributes:
        key: names it; `file.txt#3` is the third passage of a file.
        title: shown, and read before the text.
        body: the text.
    """

    key: str
    title: str
    body: str = field(repr=False)

    @property
    def text(self) -> str:
        """What is encoded: title and body."""
        return f"{self.title}. {self.body}" if self.title else self.body

    @property
    def digest(self) -> str:
        """16 hex digits over what is encoded and shown."""
        content = json.dumps([self.title, self.body]).encode()
        return hashlib.sha256(content).hexdigest()[:16]


def read_passages(folder: str | Path, words: int = 120) -> list[Passage]:
    """The passages of a folder, in the order of its lines or file names.

    Args:
        folder: see above.
        words: the most of a passage that is cut from a text file; paragraphs are put together up to
            here, longer ones are cut.

    Raises:
        InputError: there is no such folder, nothing in it, or a file can't be read.
    """
    if isinstance(words, bool) or not isinstance(words, int) or words < 1:
        raise InputError(f"words={words!r}: expected an integer of 1 or more.")
    where = _folder(folder)
    corpus = _find(where, "corpus.jsonl")
    if corpus is not None:
        found = [_document(row, corpus, number) for number, row in enumerate(_lines(corpus), 1)]
    else:
        files = sorted(p for p in where.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        found = [part for file in files for part in _parts(file, where, words)]
    if not found:
        raise InputError(
            f"{where} holds no documents: expected corpus.jsonl, or files named "
            f"{' or '.join('*' + s for s in SUFFIXES)} that aren't empty."
        )
    keys: set[str] = set()
    for one in found:
        if one.key in keys:
            raise InputError(f"{where}: two documents are called {one.key!r}; names must differ.")
        keys.add(one.key)
    return found


@dataclass(frozen=True)
class Judged:
    """Questions and the documents that answer them.

    Attributes:
        keys, texts: of the questions.
        gains: for each question the gain of each document that was judged, above 0.
    """

    keys: tuple[str, ...]
    texts: tuple[str, ...]
    gains: tuple[dict[str, float], ...]

    def __len__(self) -> int:
        return len(self.keys)


def read_judged(folder: str | Path, split: str = "test") -> Judged:
    """The questions of a split that have a document with a gain above 0.

    Raises:
        InputError: a file is missing or damaged, or no question of it is there.
    """
    where = _folder(folder)
    asked = _find(where, "queries.jsonl") or _find(where, "claims.jsonl")
    judged = [where / "qrels" / f"{split}.tsv", where / f"qrels_{split}.tsv"]
    qrels = next((path for path in judged if path.is_file()), None)
    if asked is None or qrels is None:
        raise InputError(
            f"{where} holds no judged questions: expected queries.jsonl and qrels/{split}.tsv."
        )
    gains: dict[str, dict[str, float]] = {}
    for number, line in enumerate(_text(qrels).splitlines()):
        parts = line.split("\t")
        if number == 0 or not line.strip():
            continue
        try:
            question, document, gain = parts[0], parts[1], float(parts[2])
        except (IndexError, ValueError):
            raise InputError(
                f"{qrels}: line {number + 1} isn't question, document and gain with tabs between."
            ) from None
        if gain > 0:
            gains.setdefault(question, {})[document] = gain
    texts = {str(row["_id"]): str(row["text"]) for row in _checked(asked, ("_id", "text"))}
    keys = [key for key in texts if key in gains]
    if not keys:
        raise InputError(f"{qrels} names no question of {asked}.")
    return Judged(tuple(keys), tuple(texts[key] for key in keys), tuple(gains[key] for key in keys))


def _folder(folder: str | Path) -> Path:
    where = Path(folder).expanduser()
    if str(folder) in SHIPPED and not where.exists():
        return DATA / SHIPPED[str(folder)]
    if not where.is_dir():
        raise InputError(f"{where} is no folder; give the one that holds the documents.")
    return where


def _find(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.xz") if p.is_file()), None)


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.suffix == ".xz":
            content = lzma.decompress(content)
        return content.decode("utf-8-sig")
    except (OSError, lzma.LZMAError) as error:
        raise InputError(f"{path} can't be read: {error}.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first."
        ) from error


def _lines(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}: line {number} is no JSON ({error}).") from error


def _checked(path: Path, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_lines(path), 1):
        if not isinstance(row, dict) or not all(name in row for name in names):
            raise InputError(f"{path}: line {number} lacks {' or '.join(names)}.")
        yield row


def _document(row: Any, path: Path, number: int) -> Passage:
    if not isinstance(row, dict) or "_id" not in row or not {"text", "sentences"} & set(row):
        raise InputError(f"{path}: line {number} lacks _id, or text (or sentences).")
    body = row["text"] if "text" in row else " ".join(str(s) for s in row["sentences"])
    return Passage(str(row["_id"]), str(row.get("title") or ""), str(body))


def _parts(file: Path, folder: Path, words: int) -> list[Passage]:
    name = file.relative_to(folder).as_posix()
    text = _text(file).replace("\r\n", "\n").strip()
    if "\0" in text:
        raise InputError(f"{file} holds NUL bytes: it is not a text.")
    if not text:
        return []
    first, _, rest = text.partition("\n")
    title = first.lstrip("# ").strip()
    if not rest.strip() or len(title.split()) > 20:
        title, rest = "", text
    parts: list[list[str]] = [[]]
    for paragraph in _BLANK.split(rest.strip()):
        whole = paragraph.split()
        for start in range(0, len(whole), words):
            piece = whole[start : start + words]
            if parts[-1] and len(parts[-1]) + len(piece) > words:
                parts.append([])
            parts[-1] += piece
    bodies = [" ".join(part) for part in parts if part]
    if len(bodies) == 1:
        return [Passage(name, title, bodies[0])]
    return [Passage(f"{name}#{i}", title, body) for i, body in enumerate(bodies, 1)]
