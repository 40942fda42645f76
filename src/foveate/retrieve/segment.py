"""A segment of an index: some passages' vectors in files that are mapped into memory.

    single.f16   (passages, d_c)     words.f16   (words, d)      one after the other
    ids.u32      (words)             counts.u16  (passages), how many words each keeps
    texts.jsonl  key, title, body, digest of each    places.i64   (passages + 1), its lines' starts

Numbers are little-endian, files have no header: the first two (with exact match three) are as long
as the paper's formula says. A segment is written once, beside the index, and never changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.retrieve.collection import Passage
from foveate.retrieve.files import DamagedError, sum_of, sync_folder, write_new

FILES = ("single.f16", "words.f16", "ids.u32", "counts.u16", "texts.jsonl", "places.i64")
Row = tuple[Tensor, Tensor, Tensor]
"""Of a passage: single (d_c), vectors (n, d) and ids (n) of the words that are kept."""


def write(folder: Path, name: str, passages: Sequence[Passage], rows: Sequence[Row]) -> dict:
    """Write a segment; it appears under its name when it is whole.

    Returns:
        Its entry in the index.
    """
    if sys.byteorder != "little":
        raise InputError("An index is little-endian; this machine isn't.")
    work = folder / f".new-{name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    ids = torch.cat([row[2] for row in rows])
    lines = [
        json.dumps({"key": p.key, "title": p.title, "body": p.body, "digest": p.digest}) + "\n"
        for p in passages
    ]
    places = torch.tensor([0, *(len(line.encode()) for line in lines)]).cumsum(0)
    content = {
        "single.f16": _bytes(torch.stack([row[0] for row in rows]).half()),
        "words.f16": _bytes(torch.cat([row[1] for row in rows]).half()),
        "ids.u32": _bytes(torch.where(ids < 2**31, ids, ids - 2**32).int()),
        "counts.u16": _bytes(torch.tensor([len(row[2]) for row in rows]).short()),
        "texts.jsonl": "".join(lines).encode(),
        "places.i64": _bytes(places),
    }
    files = {file: write_new(work / file, data) for file, data in content.items()}
    sync_folder(work)
    os.rename(work, folder / name)
    sync_folder(folder)
    return {
        "name": name, "passages": len(rows), "words": len(ids), "files": files, "deleted": [],
    }  # fmt: skip


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().numpy().tobytes()


@dataclass(frozen=True)
class Segment:
    """A segment, mapped into memory.

    Attributes:
        single: (P, d_c) float16. vectors: (W, d) float16. ids: (W) int64.
        starts: (P + 1) int64, where each passage's words begin.
        alive: (P) bool, passages that weren't replaced or removed.
    """

    single: Tensor
    vectors: Tensor
    ids: Tensor
    starts: Tensor
    alive: Tensor
    _texts: Tensor
    _places: Tensor

    def __len__(self) -> int:
        return len(self.single)

    def passage(self, row: int) -> Passage:
        """The text of a passage."""
        start, end = self._places[row : row + 2].tolist()
        found = json.loads(_bytes(self._texts[start:end]))
        return Passage(found["key"], found["title"], found["body"])


def check(folder: Path, entry: dict[str, Any], *, content: bool = True) -> None:
    """See that a segment's files are those that were written.

    Raises:
        FileNotFoundError: a file is gone.
        DamagedError: a file has another size or, if `content` is asked for, another sum.
    """
    for file, written in entry["files"].items():
        path = folder / entry["name"] / file
        wrong = path.stat().st_size != written["bytes"]
        if wrong or (content and sum_of(path) != written["sha256"]):
            raise DamagedError(
                f"{path} is damaged: its {'size' if wrong else 'checksum'} isn't the one that was "
                "written. Restore it from a copy, or build the index anew with --fresh."
            )


def load(folder: Path, entry: dict[str, Any], single: int, width: int) -> Segment:
    """Map a segment's files.

    Args:
        folder: of the segments.
        entry: its entry in the index.
        single, width: d_c and d.
    """
    at, passages, words = folder / entry["name"], entry["passages"], entry["words"]

    def mapped(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        count = 1
        for n in shape:
            count *= n
        if not count:
            return torch.zeros(shape, dtype=dtype)
        return torch.from_file(str(at / name), shared=False, size=count, dtype=dtype).view(shape)

    counts = mapped("counts.u16", torch.int16, passages).long() & 0xFFFF
    alive = torch.ones(passages, dtype=torch.bool)
    alive[torch.tensor(entry["deleted"], dtype=torch.long)] = False
    return Segment(
        mapped("single.f16", torch.float16, passages, single),
        mapped("words.f16", torch.float16, words, width),
        mapped("ids.u32", torch.int32, words).long() & 0xFFFFFFFF,
        torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]),
        alive,
        mapped("texts.jsonl", torch.uint8, entry["files"]["texts.jsonl"]["bytes"]),
        mapped("places.i64", torch.int64, passages + 1),
    )


def listed(folder: Path, entry: dict[str, Any]) -> list[tuple[str, str]]:
    """Key and digest of each passage.

    Raises:
        DamagedError: the file isn't there, or its sum isn't the one that was written.
    """
    path = folder / entry["name"] / "texts.jsonl"
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != entry["files"]["texts.jsonl"]["sha256"]:
        raise DamagedError(
            f"{path} is damaged: its checksum isn't the one that was written. Restore it from a "
            "copy, or build the index anew with --fresh."
        )
    found = [json.loads(line) for line in content.decode().split("\n") if line]
    return [(one["key"], one["digest"]) for one in found]
