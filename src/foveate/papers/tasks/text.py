"""Language modelling on bytes: any text, and the standard library's own source as a default."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.papers.tasks.base import Batch, Split, generator

STDLIB_BYTES = 3_000_000
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class ByteText:
    """Windows of a text, a token for each byte; each position predicts the next byte.

    The text is cut into three stretches, in order: train, validation, test. A training window
    begins at a random byte of the first; the held-out windows follow each other without overlap.

    Attributes:
        content: the text.
        length: tokens in a window.
        title: names the text.
        shares: of train and of validation; the rest is test.
        held: windows of each of validation and test, at most.
        offset: added to each byte (3 for ByT5's tokens, whose first three are special).

    Raises:
        InputError: a stretch has no room for one window.
    """

    content: bytes = field(repr=False)
    length: int = 128
    title: str = "text"
    shares: tuple[float, float] = (13 / 15, 1 / 15)
    held: int = 512
    offset: int = 0

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            low, high = self._stretch(split)
            if high - low <= self.length:
                raise InputError(
                    f"{self.title}: its {len(self.content)} bytes leave {high - low} for "
                    f"{split}, too few for a window of {self.length} and the byte that follows; "
                    "give a longer text or a smaller length."
                )

    @property
    def vocab(self) -> int:
        """256 bytes, and the offset."""
        return 256 + self.offset

    def batch(self, seed: int, number: int, size: int) -> Batch:
        """Training batch `number` of a seed: (size, length)."""
        low, high = self._stretch("train")
        random = generator("bytes", "train", seed, number)
        starts = torch.randint(low, high - self.length, (size,), generator=random)
        return self._windows(starts)

    def held_out(self, split: Split, size: int) -> Iterator[Batch]:
        """All windows of the validation or test stretch, `held` at most."""
        low, high = self._stretch(split)
        starts = torch.arange(low, high - self.length, self.length)[: self.held]
        for some in starts.split(size):
            yield self._windows(some)

    def beginning(self, length: int) -> Tensor:
        """The first `length` tokens of the text, (length,).

        Raises:
            InputError: it is shorter.
        """
        if len(self.content) < length:
            raise InputError(
                f"{self.title}: it has {len(self.content)} bytes, but {length} are asked for."
            )
        return _ids(self.content)[:length].long() + self.offset

    def describe(self) -> str:
        """Title, size and digest of the text, and how it is cut."""
        made = hashlib.sha256(self.content).hexdigest()[:12]
        return (
            f"{self.title}, {len(self.content)} bytes, sha256 {made}, in windows of {self.length}, "
            f"{self.held} of them held out"
        )

    def _stretch(self, split: str) -> tuple[int, int]:
        train, validation = self.shares
        cuts = [0, train, train + validation, 1.0]
        at = ("train", "validation", "test").index(split)
        low, high = (round(cut * len(self.content)) for cut in cuts[at : at + 2])
        return low, high

    def _windows(self, starts: Tensor) -> Batch:
        ids = _ids(self.content)
        rows = torch.stack([ids[s : s + self.length + 1] for s in starts.tolist()])
        rows = rows.long() + self.offset
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


@lru_cache(maxsize=4)
def _ids(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@lru_cache(maxsize=4)
def standard_library(length: int = 128, size: int = STDLIB_BYTES, held: int = 512) -> ByteText:
    """The source of the standard library of the Python that runs this.

    Every `*.py` under the library's folder, in the order of its path (as POSIX text), one after
    the other, up to `size` bytes; folders of tests, installed packages and caches are left out, and
    `_sysconfigdata*`, which differs by machine. The first 13/15 (2.6 MB of 3) are train, 1/15 each
    (0.2 MB) validation and test: they are of different files, but for one at each cut.

    Args:
        length: tokens in a window.
        size: bytes to take.
        held: windows of each of validation and test, at most.

    Raises:
        InputError: there is less source than that.
    """
    root = Path(sysconfig.get_path("stdlib"))
    parts: list[bytes] = []
    total = 0
    for path in _sources(root):
        parts.append((root / path).read_bytes())
        total += len(parts[-1])
        if total >= size:
            break
    if total < size:
        raise InputError(
            f"The standard library at {root} has {total} bytes of source, {size} are needed; run "
            "this in a full installation of Python."
        )
    title = f"standard library of Python {platform.python_version()}"
    return ByteText(b"".join(parts)[:size], length, title, held=held)


def _sources(root: Path) -> list[str]:
    """Paths of the library's source files, relative to its folder, sorted."""
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT]
        inside = Path(folder).relative_to(root)
        found += [(inside / name).as_posix() for name in names if name.endswith(".py")]
    return sorted(path for path in found if not path.startswith("_sysconfigdata"))


def text_file(path: str | Path, length: int, *, offset: int = 0, held: int = 512) -> ByteText:
    """A file's bytes: 90% train, 5% validation, 5% test.

    Raises:
        InputError: there is no such file, it can't be read, or it is too short.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"--data {path}: there is no such file.") from None
    except IsADirectoryError:
        raise InputError(f"--data {path} is a folder; give a text file.") from None
    except OSError as error:
        raise InputError(f"--data {path} can't be read: {error.strerror}.") from error
    return ByteText(content, length, f"file {path.name}", (0.9, 0.05), held, offset)
