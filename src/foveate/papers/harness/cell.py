"""One cell of a miniature: what is run and stored on its own."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.ops.errors import InputError
from foveate.papers.harness.paper import Found, Paper, Trial
from foveate.papers.harness.stopwatch import Stopwatch
from foveate.papers.training.errors import DivergedError


@dataclass(frozen=True)
class Cell:
    """A name and a seed; while tuning, also which point of the grid is tried."""

    name: str
    seed: int
    point: int | None = None

    def words(self, paper: Paper) -> str:
        """For people."""
        if self.point is None or paper.grid is None:
            return f"{self.name}, seed {self.seed}"
        return f"{self.name}, {paper.grid.name} {paper.grid.points[self.point]}"


def run_cell(
    paper: Paper,
    cell: Cell,
    tuned: Any,
    checkpoints: Path,
    *,
    quick: bool,
    device: torch.device,
    tell: Callable[[float, str], None],
) -> dict[str, Any]:
    """Run a cell from its seed.

    Args:
        paper: the miniature.
        cell: of it.
        tuned: the best point of the grid; for a trial, which tries its own, it isn't looked at.
        checkpoints: folder for what a training keeps, and for the seconds so far; removed at the
            end.
        quick: small sizes.
        device: to run on.
        tell: takes the share that is done and a few words.

    Returns:
        "found": figures by arm and metric; "diverged": a trial whose point can't be trained with;
        "seconds": over all runs that worked on it.

    Raises:
        DivergedError: a training went wrong that is no trial.
        InputError: a figure is no number.
    """
    grid = paper.grid
    watch = Stopwatch(checkpoints / "seconds")
    what = cell.words(paper)

    def said(share: float, doing: str) -> None:
        watch.tick()
        tell(share, f"{what}: {doing}" if doing else what)

    said(0.0, "")
    trial = Trial(
        cell=cell.name,
        seed=cell.seed,
        quick=quick,
        tuned=tuned if cell.point is None or grid is None else grid.points[cell.point],
        tuning=cell.point is not None,
        share=1.0 if cell.point is None or grid is None else grid.share_of(cell.name),
        folder=checkpoints,
        device=device,
        tell=said,
    )
    found: Found = {}
    try:
        with _seeded(cell.seed):
            found = paper.run(trial)
    except DivergedError:
        if cell.point is None:
            raise
    except BaseException:
        watch.keep()
        raise
    seconds = watch.seconds
    _check_finite(paper, found)
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


def _check_finite(paper: Paper, found: Found) -> None:
    for arm, metrics in found.items():
        for metric, value in metrics.items():
            if not isinstance(value, list) and not math.isfinite(value):
                raise InputError(
                    f"{paper.key}: {metric} of {arm} is {value}, which can't be judged; a training "
                    "that went wrong must raise DivergedError."
                )
