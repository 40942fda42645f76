"""The results file: one JSON line per measured cell, safe against being killed at any moment.

A record's key is a digest of everything that the figures depend on, so that what was measured with
another model, text, dtype, thread count, method or version of foveate is never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from foveate.ops.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: two runs into one folder are then the user's own lookout
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1
FILE = "results.jsonl"


def digest(value: Any) -> str:
    """32 hex digits of the sha256 of a JSON value, its keys sorted."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Records:
    """The records of an output folder, which is locked while this is open.

    Args:
        folder: the output folder; made if it isn't there.
        fresh: put earlier results aside and begin anew.

    Raises:
        InputError: the folder can't be written, another process writes there, or the results are
            damaged elsewhere than in the last line. Damaged results are kept aside, whole; the
            good records among them stay, so that the next run goes on from these.
    """

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.folder = folder
        self.path = folder / FILE
        self.notes: list[str] = []
        self._found: dict[str, dict[str, Any]] = {}
        self._lock = locked(folder)
        try:
            if fresh and self.path.exists():
                kept = self._aside("old")
                self.path.rename(kept)
                self.notes.append(f"Earlier results were put aside as {kept.name}.")
            if self.path.exists():
                self._read()
            self._file = self.path.open("ab", buffering=0)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let others write in the folder."""
        self._file.close()
        self._lock.close()

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def get(self, key: str) -> dict[str, Any] | None:
        """The values of a record, or None if it hasn't been measured."""
        record = self._found.get(key)
        return None if record is None else record["values"]

    def others(self, key: str, cell: dict[str, Any]) -> list[dict[str, Any]]:
        """What the same cell has under other keys; nothing if it is there under this one."""
        if key in self._found:
            return []
        wanted = digest(cell)
        found = self._found.values()
        return [record["values"] for record in found if digest(record["cell"]) == wanted]

    def add(self, key: str, cell: dict[str, Any], values: dict[str, Any]) -> None:
        """Append a record; when this returns it is on the disk.

        Raises:
            InputError: it can't be written, such as on a full disk. The records before it stay.
        """
        sum_ = digest([cell, values])
        record = {"schema": SCHEMA, "key": key, "cell": cell, "values": values, "sum": sum_}
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        end = self._file.tell()
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            raise InputError(
                f"{self.path}: a result can't be written ({error.strerror}). The "
                f"{len(self._found)} before it are kept: make room, and start again to go on."
            ) from error
        self._found[key] = record

    def _aside(self, why: str) -> Path:
        number = 1
        while (kept := self.folder / f"results.{why}-{number}.jsonl").exists():
            number += 1
        return kept

    def _read(self) -> None:
        data = self.path.read_bytes()
        *lines, tail = data.split(b"\n")
        good: list[bytes] = []
        damaged: list[int] = []
        for number, line in enumerate(lines, 1):
            record = _parsed(line)
            if record is None:
                damaged.append(number)
            else:
                good.append(line)
                self._found[record["key"]] = record
        if damaged:
            kept = self._aside("corrupt")
            _write(self.path.with_suffix(".new"), b"".join(line + b"\n" for line in good))
            self.path.rename(kept)
            self.path.with_suffix(".new").rename(self.path)
            raise InputError(
                f"{self.path}: line {damaged[0]} is damaged ({len(damaged)} of {len(lines)} "
                f"lines). The file was kept as {kept.name}; its {len(good)} good records stay in "
                f"{FILE}. Run again to go on from these, or with --fresh to begin anew."
            )
        if tail:
            # A write that was cut off: the cell is measured again, what was written is kept.
            kept = self._aside("unfinished")
            _write(kept, tail)
            with self.path.open("rb+") as file:
                file.truncate(len(data) - len(tail))
                os.fsync(file.fileno())
            self.notes.append(f"The last record was cut off and put aside as {kept.name}.")


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    shaped = (
        isinstance(record, dict)
        and record.get("schema") == SCHEMA
        and isinstance(record.get("key"), str)
        and isinstance(record.get("cell"), dict)
        and isinstance(record.get("values"), dict)
        and record.get("sum") == digest([record["cell"], record["values"]])
    )
    return record if shaped else None


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def locked(folder: Path) -> Any:
    """Keep other processes from writing into a folder until what this returns is closed.

    Raises:
        InputError: the folder can't be written, or another process holds it.
    """
    writable_folder(folder)
    lock = (folder / ".lock").open("w")
    if fcntl is None:
        return lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise InputError(
            f"Another foveate command is writing into {folder}; wait for it or give another --out."
        ) from None
    return lock


def writable_folder(folder: Path) -> None:
    """Make the output folder and try that it can be written.

    Raises:
        InputError: it can't.
    """
    advice = "give a folder that can be written with --out"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except FileExistsError:
        raise InputError(f"--out {folder} is a file; {advice}.") from None
    except NotADirectoryError:
        raise InputError(f"--out {folder} lies under a file; {advice}.") from None
    except OSError as error:
        raise InputError(
            f"--out {folder} can't be written ({error.strerror}); {advice}."
        ) from error
