"""What both jobs share: cells one by one into the records, threads set and put back, checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from foveate.bench.machine import environment
from foveate.ops.errors import InputError, nearest
from foveate.runs.machine import load_average
from foveate.runs.records import Records, digest
from foveate.runs.timing import CLOCKS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Begin = Callable[[str, int, int], None]


def run_cells(
    job: str,
    cells: Sequence[Any],
    how: dict[str, Any],
    measure: Callable[[Any], dict[str, Any]],
    records: Records | None,
    begin: Begin | None,
    noting: bool = True,
) -> list[dict[str, Any]]:
    """Measure every cell that isn't in the records yet.

    Args:
        job: its name, in each record's cell.
        cells: dataclasses; each has `threads`.
        how: whatever else the figures depend on.
        measure: the values of one cell.
        records: where finished cells are kept, and found again.
        begin: told (label, number of this cell from 0, number of cells) before each.
        noting: leave in the records' notes why cells that they have are measured anew; not wanted
            where a job hands its cells over one by one.

    Returns:
        {"cell", "values"} of all cells, in order.
    """
    here, done = environment(), []
    names = [{"job": job, **asdict(cell)} for cell in cells]
    keys = [digest({"cell": named, "how": how, "environment": here}) for named in names]
    if records is not None and noting:
        _note_others(records, names, keys, here)
    for number, (cell, named, key) in enumerate(zip(cells, names, keys, strict=True)):
        if begin is not None:
            begin(str(cell), number, len(cells))
        values = None if records is None else records.get(key)
        if values is None:
            values = {**_with_threads(cell, measure), "environment": here}
            if records is not None:
                records.add(key, named, values)
        done.append({"cell": named, "values": values})
    return done


def _note_others(
    records: Records, names: list[dict[str, Any]], keys: list[str], here: dict[str, Any]
) -> None:
    """Say why cells that the records have are measured anew: what their nearest line differs in."""
    reasons: Counter[str] = Counter()
    for key, named in zip(keys, names, strict=True):
        differences = [
            [name for name in here if values.get("environment", {}).get(name) != here[name]]
            for values in records.others(key, named)
        ]
        if differences:
            least = min(differences, key=len)
            reasons["another " + ", ".join(least) if least else "other settings"] += 1
    for reason, count in reasons.items():
        records.notes.append(
            f"Of {len(keys)} cells {count} that {records.path} has with {reason} will be measured "
            "anew, beside the earlier lines (--fresh puts those aside)."
        )


def _with_threads(cell: Any, measure: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    before, threads = load_average(), torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    try:
        values = measure(cell)
    finally:
        torch.set_num_threads(threads)
    return {**values, "load": [before, load_average()]}


def told(error: Exception) -> str:
    """What went wrong, on one line of bearable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."


def check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that aren't known.

    Raises:
        InputError: one isn't.
    """
    known = list(known)
    for name in given:
        if name not in known:
            raise InputError(f"{what} {name!r} is not known; {nearest(name, known)}")


def check_clock(clock: str, threads: Iterable[int]) -> None:
    """Refuse processor time where it isn't what a person waits.

    Raises:
        InputError: the clock is unknown, or adds up several threads.
    """
    if clock not in CLOCKS:
        raise InputError(f"clock {clock!r}: expected {' or '.join(CLOCKS)}.")
    if clock == "cpu" and any(count > 1 for count in threads):
        raise InputError("the cpu clock adds up all threads; use it with one, or take wall.")


def check_sizes(**sizes: Iterable[int]) -> None:
    """Refuse sizes below 1.

    Raises:
        InputError: one is.
    """
    for name, given in sizes.items():
        for size in given:
            if size < 1:
                raise InputError(f"{name.replace('_', '-')} must be at least 1, got {size}.")
