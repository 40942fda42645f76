"""Runs a miniature: cells one by one into the records, then the verdict and its files.

Every finished cell is on the disk before the next begins, and a training inside one keeps its own
checkpoints; started again, a run goes on where it was stopped and runs nothing twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.ops.errors import InputError
from foveate.papers.harness.cell import Cell, run_cell
from foveate.papers.harness.environment import environment
from foveate.papers.harness.listener import Listener
from foveate.papers.harness.paper import Found, Paper
from foveate.papers.harness.verdict import Outcome, outcomes, verdict_object
from foveate.papers.harness.workers import Job, run_jobs
from foveate.papers.training.errors import DivergedError
from foveate.runs.records import Records, digest

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Result:
    """What a run found.

    Attributes:
        paper: the miniature.
        verdict: the object of `verdict_object`.
        outcomes: of its checks.
        seeds: by seed the figures by arm and metric, curves included.
        ran: cells that were run now; found: those that were stored before.
        files: what was written, by kind.
    """

    paper: Paper
    verdict: dict[str, Any]
    outcomes: list[Outcome]
    seeds: dict[int, Found]
    ran: int
    found: int
    files: dict[str, Path]


class Run:
    """One miniature in one folder, which is locked from here until `close`.

    Args:
        paper: the miniature.
        out: its results lie in `out/<key>`.
        quick: small sizes and one seed.
        fresh: put earlier results aside.
        device: to run on.
        listener: hears how it goes on.
        workers: cells that run side by side, each in a process of its own with an equal part of
            torch's threads. Cells that take times (`Paper.alone`) follow one by one.

    Only the stored results of cells that take times are of a number of threads: others are taken
    over whatever it was.

    Raises:
        InputError: the folder can't be written, is in use, or its results are damaged (they are
            kept aside; the good ones among them stay).
    """

    def __init__(
        self,
        paper: Paper,
        out: Path,
        *,
        quick: bool = False,
        fresh: bool = False,
        device: torch.device | None = None,
        listener: Listener | None = None,
        workers: int = 1,
    ) -> None:
        if workers < 1:
            raise InputError(f"workers must be 1 or more, got {workers}.")
        self.paper, self.quick, self.workers = paper, quick, workers
        self.folder = out / paper.key
        self.device = torch.device("cpu") if device is None else device
        self.listener = Listener() if listener is None else listener
        self.records = Records(self.folder, fresh=fresh)
        if fresh:
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)

    def close(self) -> None:
        """Let others write in the folder."""
        self.records.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self) -> Result:
        """Run what isn't stored yet, judge, and write the verdict."""
        for note in self.records.notes:
            self.listener.say(f"{self.paper.key}: {note}")
        here = environment(self.device) | {"data": self.paper.data(), "quick": self.quick}
        seeds = self.paper.seeds[:1] if self.quick else self.paper.seeds
        trials = self._trials()
        cells = [Cell(name, seed) for seed in seeds for name in self.paper.cells]
        total = len(trials) + len(cells)
        kept: dict[Cell, dict[str, Any]] = {}
        self.listener.begin(self.paper.key, total)
        ran = self._take(trials, {}, here, kept)
        tuned = {name: self._best(name, kept) for name in dict.fromkeys(c.name for c in trials)}
        ran += self._take(cells, tuned, here, kept)
        self.listener.end()
        found = {seed: _of_seed(self.paper, kept, seed) for seed in seeds}
        if self.workers > 1:
            here = here | {"workers": self.workers}
        if tuned:
            grid = self.paper.grid
            assert grid is not None
            here = here | {"tuned": {grid.name: tuned}, "tried": {grid.name: list(grid.points)}}
            if grid.share < 1:
                here = here | {"trials": {name: grid.share_of(name) for name in tuned}}
        verdict = verdict_object(
            self.paper, found, sum(values["seconds"] for values in kept.values()), here
        )
        told = outcomes(self.paper, list(found.values()), quick=self.quick)
        files = {"records": self.records.path, "verdict": self.folder / _name(self.quick)}
        _write(files["verdict"], verdict)
        return Result(self.paper, verdict, told, found, ran, total - ran, files)

    def _take(
        self,
        cells: list[Cell],
        tuned: dict[str, Any],
        here: dict[str, Any],
        kept: dict[Cell, dict[str, Any]],
    ) -> int:
        """Put the figures of cells into `kept`, those that aren't stored by running them."""
        source = _source(self.paper)
        jobs = []
        for cell in cells:
            named = self._named(cell, tuned)
            place = here if cell.name in self.paper.alone else _anywhere(here)
            key = digest({"cell": named, "source": source, "environment": place})
            values = self.records.get(key)
            if values is None:
                checkpoints = self.folder / CHECKPOINTS / key
                jobs.append(Job(cell, tuned.get(cell.name), key, checkpoints))
            else:
                kept[cell] = values
                self.listener.skip()
        self.listener.advance(len(kept), "")
        for job, values in self._run(jobs, kept):
            self.records.add(job.key, self._named(job.cell, tuned), values)
            kept[job.cell] = values
            self.listener.advance(len(kept), job.cell.words(self.paper))
        return len(jobs)

    def _named(self, cell: Cell, tuned: dict[str, Any]) -> dict[str, Any]:
        named = dataclasses.asdict(cell) | {"tuned": tuned.get(cell.name), "quick": self.quick}
        if cell.point is not None and self.paper.grid is not None:
            named["share"] = self.paper.grid.share_of(cell.name)
        return named

    def _beside(self, cell: Cell) -> bool:
        """Whether it runs beside others."""
        return self.workers > 1 and cell.name not in self.paper.alone

    def _threads(self, cell: Cell) -> int:
        threads = torch.get_num_threads()
        return max(1, threads // self.workers) if self._beside(cell) else threads

    def _run(
        self, jobs: list[Job], kept: dict[Cell, dict[str, Any]]
    ) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Run jobs, side by side those that may."""

        def tell(share: float, doing: str) -> None:
            self.listener.advance(len(kept) + share, doing)

        beside = [job for job in jobs if self._beside(job.cell)]
        if beside:
            yield from run_jobs(
                self.paper, beside, workers=self.workers,
                threads=self._threads(beside[0].cell), quick=self.quick, device=self.device,
                tell=tell,
            )  # fmt: skip
        for job in jobs:
            if not self._beside(job.cell):
                yield job, run_cell(
                    self.paper, job.cell, job.tuned, job.checkpoints, quick=self.quick,
                    device=self.device, tell=tell,
                )  # fmt: skip

    def _trials(self) -> list[Cell]:
        grid = self.paper.grid
        if grid is None:
            return []
        points = range(len(grid.points))
        tuned = grid.cells or self.paper.cells
        return [Cell(name, grid.seed, at) for name in tuned for at in points]

    def _best(self, name: str, kept: dict[Cell, dict[str, Any]]) -> Any:
        grid = self.paper.grid
        assert grid is not None
        tried = [kept[Cell(name, grid.seed, at)] for at in range(len(grid.points))]
        losses = [
            math.inf if values["diverged"] else values["found"][name][grid.metric]
            for values in tried
        ]
        if min(losses) == math.inf:
            raise DivergedError(
                f"{self.paper.key}: {name} diverged at every {grid.name} of {grid.points}; "
                "put a lower one into the miniature's grid, for all arms alike."
            )
        return grid.points[losses.index(min(losses))]


def _of_seed(paper: Paper, kept: dict[Cell, dict[str, Any]], seed: int) -> Found:
    arms: dict[str, Any] = {}
    for name in paper.cells:
        for arm, metrics in kept[Cell(name, seed)]["found"].items():
            arms[arm] = arms.get(arm, {}) | metrics
    missing = [arm for arm in (*paper.baseline, *paper.ours) if arm not in arms]
    if missing:
        raise InputError(f"{paper.key}: no cell returned the arms {', '.join(missing)}.")
    return arms


def _source(paper: Paper) -> str:
    """12 hex digits over the miniature's own file: its thresholds and sizes."""
    run: Callable[..., Any] = paper.run
    module = sys.modules[getattr(run, "__module__", __name__)]
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:12]


def _name(quick: bool) -> str:
    return "verdict.quick.json" if quick else "verdict.json"


def _write(path: Path, value: dict[str, Any]) -> None:
    """Replace a file by JSON, whole or not at all."""
    new = path.with_suffix(".new")
    with new.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _anywhere(here: dict[str, Any]) -> dict[str, Any]:
    """An environment for cells whose figures don't depend on the number of threads."""
    return {name: value for name, value in here.items() if name != "threads"}
