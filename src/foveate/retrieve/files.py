"""Files that are there whole or not at all, and sums that show when one was changed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from foveate.ops.errors import InputError
from foveate.runs.records import digest


class DamagedError(InputError):
    """A file isn't what its checksum says."""


def sum_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_new(path: Path, content: bytes) -> dict[str, Any]:
    """Write a file to the disk; returns its size and sum."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a file by a JSON object that carries its own sum, in one step."""
    new = path.with_suffix(".new")
    content = json.dumps(value | {"sum": digest(value)}, indent=1, allow_nan=False)
    write_new(new, content.encode() + b"\n")
    os.replace(new, path)
    sync_folder(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """What `replace_json` wrote; None if there is no such file.

    Raises:
        DamagedError: it was changed since.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}.") from error
    try:
        value: dict[str, Any] = json.loads(content)
        written = value.pop("sum")
    except (ValueError, KeyError, AttributeError, TypeError):
        written = None
    if written is None or written != digest(value):
        raise DamagedError(
            f"{path} is damaged: its content doesn't match its checksum. Restore it from a copy, "
            "or build the index anew with --fresh."
        )
    return value
