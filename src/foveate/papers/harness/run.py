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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.ops.errors import InputError
from foveate.papers.harness.environment import environment
from foveate.papers.harness.listener import Listener
from foveate.papers.harness.paper import Found, Paper, Trial
from foveate.papers.harness.stopwatch import Stopwatch
from foveate.papers.harness.verdict import Outcome, outcomes, verdict_object
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


@dataclass(frozen=True)
class _Cell:
    name: str
    seed: int
    point: int | None = None  # of the grid, while tuning


class Run:
    """One miniature in one folder, which is locked from here until `close`.

    Args:
        paper: the miniature.
        out: its results lie in `out/<key>`.
        quick: small sizes and one seed.
        fresh: put earlier results aside.
        device: to run on.
        listener: hears how it goes on.

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
    ) -> None:
        self.paper, self.quick = paper, quick
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
        source = _source(self.paper)
        seeds = self.paper.seeds[:1] if self.quick else self.paper.seeds
        trials = self._trials()
        tried = {cell.name for cell in trials}
        cells = trials + [_Cell(name, seed) for seed in seeds for name in self.paper.cells]
        tuned: dict[str, Any] = {}
        kept: dict[_Cell, dict[str, Any]] = {}
        self.listener.begin(self.paper.key, len(cells))
        ran = 0
        for number, cell in enumerate(cells):
            if cell.point is None and cell.name not in tuned and cell.name in tried:
                tuned[cell.name] = self._best(cell.name, kept)
            named = dataclasses.asdict(cell) | {"tuned": tuned.get(cell.name), "quick": self.quick}
            key = digest({"cell": named, "source": source, "environment": here})
            values = self.records.get(key)
            if values is None:
                values = self._run(cell, tuned.get(cell.name), key, number)
                self.records.add(key, named, values)
                ran += 1
            else:
                self.listener.skip()
            kept[cell] = values
            self.listener.advance(number + 1, "")
        self.listener.end()
        found = {seed: _of_seed(self.paper, kept, seed) for seed in seeds}
        if tuned:
            here = here | {"tuned": {self.paper.grid.name: tuned}}  # type: ignore[union-attr]
        verdict = verdict_object(
            self.paper, found, sum(values["seconds"] for values in kept.values()), here
        )
        told = outcomes(self.paper, list(found.values()), quick=self.quick)
        files = {"records": self.records.path, "verdict": self.folder / _name(self.quick)}
        _write(files["verdict"], verdict)
        return Result(self.paper, verdict, told, found, ran, len(cells) - ran, files)

    def _trials(self) -> list[_Cell]:
        grid = self.paper.grid
        if grid is None:
            return []
        points = range(len(grid.points))
        tuned = grid.cells or self.paper.cells
        return [_Cell(name, grid.seed, at) for name in tuned for at in points]

    def _best(self, name: str, kept: dict[_Cell, dict[str, Any]]) -> Any:
        grid = self.paper.grid
        assert grid is not None
        tried = [kept[_Cell(name, grid.seed, at)] for at in range(len(grid.points))]
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

    def _run(self, cell: _Cell, tuned: Any, key: str, number: int) -> dict[str, Any]:
        grid = self.paper.grid
        point = tuned if cell.point is None or grid is None else grid.points[cell.point]
        what = f"{cell.name}, seed {cell.seed}"
        if grid is not None and cell.point is not None:
            what = f"{cell.name}, {grid.name} {point}"
        checkpoints = self.folder / CHECKPOINTS / key

        watch = Stopwatch(checkpoints / "seconds")

        def tell(share: float, doing: str) -> None:
            watch.tick()
            self.listener.advance(number + share, f"{what}: {doing}" if doing else what)

        tell(0.0, "")
        trial = Trial(
            cell=cell.name,
            seed=cell.seed,
            quick=self.quick,
            tuned=point,
            tuning=cell.point is not None,
            folder=checkpoints,
            device=self.device,
            tell=tell,
        )
        found: Found = {}
        try:
            with _seeded(cell.seed):
                found = self.paper.run(trial)
        except DivergedError:
            if cell.point is None:
                raise
        except BaseException:
            watch.keep()
            raise
        seconds = watch.seconds
        _check_finite(self.paper, found)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return {"found": found, "diverged": not found, "seconds": seconds}


class _seeded:
    """Seeds torch for a cell, and puts its random state back."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.fork = torch.random.fork_rng(devices=[])

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)


def _of_seed(paper: Paper, kept: dict[_Cell, dict[str, Any]], seed: int) -> Found:
    arms: dict[str, Any] = {}
    for name in paper.cells:
        for arm, metrics in kept[_Cell(name, seed)]["found"].items():
            arms[arm] = arms.get(arm, {}) | metrics
    missing = [arm for arm in (*paper.baseline, *paper.ours) if arm not in arms]
    if missing:
        raise InputError(f"{paper.key}: no cell returned the arms {', '.join(missing)}.")
    return arms


def _check_finite(paper: Paper, found: Found) -> None:
    for arm, metrics in found.items():
        for metric, value in metrics.items():
            if not isinstance(value, list) and not math.isfinite(value):
                raise InputError(
                    f"{paper.key}: {metric} of {arm} is {value}, which can't be judged; a training "
                    "that went wrong must raise DivergedError."
                )


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
