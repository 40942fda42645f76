"""KGAT's published file format: a folder of plain text.

    train.txt, test.txt[, valid.txt]   user item item ...        a line for each user
    kg_final.txt                       head relation tail        entities; items are the first
    user_list.txt, item_list.txt, entity_list.txt, relation_list.txt
                                       name number [...]         after a line of headings; optional

Nothing else than numbers is taken from the first four; lists only give names to show.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.recommend.dataset import Dataset, distinct


def read_folder(folder: str | Path) -> Dataset:
    """Read a data set.

    Raises:
        InputError: a file is missing or isn't text, or a line isn't what it must be (with its
            number).
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder; expected one with train.txt, test.txt and kg_final.txt."
        )
    train, test = pairs(folder / "train.txt"), pairs(folder / "test.txt")
    validation = (
        pairs(folder / "valid.txt") if (folder / "valid.txt").exists() else train.new_empty(0, 2)
    )
    every = torch.cat((train, validation, test))
    if not len(train):
        raise InputError(f"{folder / 'train.txt'} has no interaction.")
    users, items = (every.max(0).values + 1).tolist()
    known = triples(folder / "kg_final.txt")
    names = {
        what: listed_names(folder / f"{what}_list.txt")
        for what in ("user", "item", "entity", "relation")
    }
    listed = [number + 1 for number in names["item"]]
    items = max([items, *listed])
    entities, relations = items, 0
    if len(known):
        entities = max(items, int(known[:, ::2].max()) + 1)
        relations = int(known[:, 1].max()) + 1
    train = distinct(train, items)
    validation = distinct(validation, items, train)
    return Dataset(
        folder.name, users, items, entities, relations, train, validation,
        distinct(test, items, torch.cat((train, validation))), known.unique(dim=0),
        names["user"], names["entity"] | names["item"], names["relation"],
    )  # fmt: skip


def pairs(path: Path) -> Tensor:
    """`user item item ...` lines as (n, 2) int64."""
    found = array("q")  # eight bytes a number; published files have millions
    for _, (user, *items) in _numbers(path, least=1):
        for item in items:
            found.extend((user, item))
    return _tensor(found, 2)


def triples(path: Path) -> Tensor:
    """`head relation tail` lines as (n, 3) int64."""
    found = array("q")
    for number, row in _numbers(path, least=3):
        if len(row) != 3:
            raise InputError(
                f"{path}, line {number}: expected head, relation and tail, got {len(row)} numbers."
            )
        found.extend(row)
    return _tensor(found, 3)


def _tensor(found: array[int], columns: int) -> Tensor:
    if not found:
        return torch.empty(0, columns, dtype=torch.int64)
    return torch.frombuffer(found, dtype=torch.int64).clone().reshape(-1, columns)


def sequences(path: Path) -> list[list[int]]:
    """`user item item ...` lines in order of time: each line's items, by line."""
    return [row[1:] for _, row in _numbers(path, least=1)]


def write_folder(data: Dataset, folder: Path) -> None:
    """Write a data set in this format, for other programs or to look at."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": data.train, "test": data.test}
    if len(data.validation):
        parts["valid"] = data.validation
    for name, part in parts.items():
        rows: dict[int, list[int]] = {}
        for user, item in part.tolist():
            rows.setdefault(user, []).append(item)
        lines = (" ".join(map(str, (user, *found))) for user, found in sorted(rows.items()))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "kg_final.txt").write_text(
        "".join(f"{h} {r} {t}\n" for h, r, t in data.knowledge.tolist()), encoding="utf-8"
    )


def _numbers(path: Path, least: int) -> Iterator[tuple[int, list[int]]]:
    for number, line in enumerate(_lines(path), 1):
        words = line.split()
        if not words:
            continue
        if len(words) < least or not all(word.isascii() and word.isdecimal() for word in words):
            raise InputError(
                f"{path}, line {number}: expected numbers of 0 or more, {least} at least, between "
                f"spaces; got {line[:60]!r}."
            )
        row = [int(word) for word in words]
        if max(row) >= 2**31:
            raise InputError(f"{path}, line {number}: {max(row)} is no number of a user or item.")
        yield number, row


def listed_names(path: Path) -> dict[int, str]:
    """`name number [...]` behind a line of headings; a name may hold spaces only if tabs divide."""
    if not path.exists():
        return {}
    found: dict[int, str] = {}
    for line in islice(_lines(path), 1, None):
        words = line.split("\t") if "\t" in line else line.split()
        if len(words) >= 2 and words[1].strip().isdecimal():
            found[int(words[1])] = words[0]
    return found


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                yield line.rstrip("\n")
    except FileNotFoundError:
        raise InputError(
            f"{path}: there is no such file; a data set's folder has train.txt, test.txt and "
            "kg_final.txt."
        ) from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} isn't UTF-8 text (byte {error.start}).") from error
