"""What the commands share: a job with its progress, what is printed, and words and numbers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from foveate.ops.errors import InputError, MissingPackageError


def run_job(
    job: Callable[..., list[dict[str, Any]]], out: str, fresh: bool
) -> list[dict[str, Any]]:
    """Run a job with its records and a bar of progress on standard error."""
    from foveate.runs.records import Records

    errors = Console(stderr=True)
    with (
        Records(Path(out), fresh=fresh) as records,
        Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=errors, transient=True,
        ) as progress,
    ):  # fmt: skip
        task = progress.add_task("", total=None)

        def tell() -> None:
            for note in records.notes:
                errors.print(Text(note, style="dim"), soft_wrap=True)
            records.notes.clear()

        tell()

        def begin(label: str, number: int, total: int) -> None:
            tell()
            progress.update(task, description=label, completed=number, total=total)

        found = job(records, begin)
        tell()
        return found


def print_json(found: list[dict[str, Any]], lines: list[str]) -> None:
    """Cells and summary as JSON on standard output."""
    sys.stdout.write(json.dumps({"cells": found, "summary": lines}, indent=2) + "\n")


def close(console: Console, lines: list[str], paths: list[Path | None]) -> None:
    """Print the summary and where the results are."""
    for line in lines:
        console.print(Text(line, style="bold"), soft_wrap=True)
    for path in paths:
        if path is not None:
            console.print(Text(str(path), style="dim"), soft_wrap=True)


def draw(
    figure: Callable[[list[dict[str, Any]], Path], Path], found: list[dict[str, Any]], path: Path
) -> Path | None:
    """Write a figure; without matplotlib say so, and give None."""
    try:
        return figure(found, path)
    except MissingPackageError as error:
        Console(stderr=True).print(Text(str(error), style="dim"), soft_wrap=True)
        return None


def screen() -> Console:
    """The console of the tables: wide where nobody says how wide it is."""
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, width=170 if wide else None)


def words(text: str | None) -> tuple[str, ...]:
    """Words between commas, each once."""
    return tuple(dict.fromkeys(w.strip() for w in (text or "").split(",") if w.strip()))


def numbers(name: str, text: str | None) -> tuple[int, ...]:
    """Whole numbers between commas.

    Raises:
        InputError: something else stands there.
    """
    found = []
    for word in words(text):
        if not word.isdecimal():
            raise InputError(f"{name} {text!r}: expected whole numbers, such as 64,128.")
        found.append(int(word))
    return tuple(found)
