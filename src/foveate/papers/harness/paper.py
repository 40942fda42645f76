"""What a miniature states: arms, data, checks with their thresholds, and how one cell is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.papers.harness.statistics import Verdict, judge

Found = Mapping[str, Mapping[str, Any]]
"""By arm and metric: a figure; by arm and "curve": pairs of `Paper.axes`, for the figure."""


def _say_nothing(share: float, doing: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Trial:
    """What a cell of a miniature is told.

    Attributes:
        cell: its name.
        seed: of initialisation and of the order of the training data.
        quick: the same path, at a size that takes seconds.
        tuned: the point of the miniature's grid that was best for this cell, or that is tried for
            it; None without a grid.
        tuning: a point is tried.
        share: of a whole run that is trained: the grid's while tuning, else 1.
        folder: where a training may keep its checkpoints; None keeps none.
        device: to run on.
        tell: takes the share of the cell that is done, 0 to 1, and what it is doing.
    """

    cell: str
    seed: int
    quick: bool = False
    tuned: Any = None
    tuning: bool = False
    share: float = 1.0
    folder: Path | None = None
    device: torch.device = torch.device("cpu")
    tell: Callable[[float, str], None] = _say_nothing

    def steps(self, whole: int, quick: int = 4) -> int:
        """Steps (or epochs) to train for.

        Args:
            whole: of a run that is judged; while tuning, `share` of them, rounded down.
            quick: where all is quick.
        """
        return quick if self.quick else max(1, int(whole * self.share + 1e-9))


@dataclass(frozen=True)
class Check:
    """One condition of a claim: a figure of each seed against a threshold.

    Attributes:
        name: the figure in words, such as "loss(MFA) - loss(MHA)".
        figure: computes it from one seed's figures by arm and metric.
        holds: the threshold; a figure on it is good.
        refuted: beyond this the claim is refuted; None is `holds` itself, `math.inf` (or -inf) is
            never by this check alone.
        at_least: good is above the threshold, not below.
        exact: the figure is counted, not sampled: no seed changes it and a quick run decides it.
    """

    name: str
    figure: Callable[[Found], float]
    holds: float
    refuted: float | None = None
    at_least: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        worse = self.holds if self.refuted is None else self.refuted
        if worse > self.holds if self.at_least else worse < self.holds:
            raise ValueError(f"{self.name}: refuted at {worse}, on the good side of {self.holds}")

    @property
    def text(self) -> str:
        """The condition in words, its thresholds included."""
        sign, beyond = (">=", "<") if self.at_least else ("<=", ">")
        said = f"{self.name} {sign} {self.holds:g}"
        if self.refuted is None:
            return said
        if math.isinf(self.refuted):
            return f"{said} (alone it refutes nothing)"
        return f"{said} (refuted: {beyond} {self.refuted:g})"

    def values(self, seeds: list[Found]) -> list[float]:
        """The figure of each seed."""
        return [float(self.figure(found)) for found in seeds]

    def verdict(self, seeds: list[Found]) -> Verdict:
        """By the rule of `harness.statistics`."""
        worse = self.holds if self.refuted is None else self.refuted
        return judge(
            self.values(seeds), self.holds, worse, at_least=self.at_least, exact=self.exact
        )


def at_most(name: str, figure: Callable[[Found], float], holds: float, **more: Any) -> Check:
    """A check that is good below its threshold."""
    return Check(name, figure, holds, **more)


def at_least(name: str, figure: Callable[[Found], float], holds: float, **more: Any) -> Check:
    """A check that is good above its threshold."""
    return Check(name, figure, holds, at_least=True, **more)


def difference(ours: str, other: str, most: float, metric: str = "loss", **more: Any) -> Check:
    """At most so much above another arm."""
    return at_most(
        f"{metric}: {ours} - {other}", lambda at: at[ours][metric] - at[other][metric], most, **more
    )


def ratio(over: str, under: str, least: float, metric: str, **more: Any) -> Check:
    """At least so many times another arm."""
    name = f"{metric}: {over} / {under}"
    return at_least(name, lambda at: at[over][metric] / at[under][metric], least, **more)


@dataclass(frozen=True)
class Grid:
    """What is tuned, for baselines and methods alike, before any seed is run.

    Attributes:
        name: of what is tuned, such as "learning rate".
        points: each is tried for each cell.
        metric: of the cell's own arm; the point with the least is taken. It must not be taken on
            the data that the verdict is taken on.
        seed: of the trials; none of the seeds that are judged.
        cells: that are tuned; empty is all.
        share: of a whole run's steps that a trial takes. Short trials favour learning rates that
            are too high for the whole run, so that less than 1 is a saving which is paid for.
        whole: cells whose trials take all steps whatever the share.
    """

    name: str
    points: tuple[Any, ...]
    metric: str = "validation"
    seed: int = 1000
    cells: tuple[str, ...] = ()
    share: float = 1.0
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"{self.name}: a trial's share must be above 0, at most 1")

    def share_of(self, cell: str) -> float:
        """Of a whole run, what a trial of a cell takes."""
        return 1.0 if cell in self.whole else self.share


@dataclass(frozen=True)
class Paper:
    """The miniature of one paper.

    Attributes:
        key: of the paper, as `foveate reproduce` takes it.
        claim: what the paper says, in one sentence.
        metric: what is compared, with its unit.
        cells: what is run and stored on its own, in this order, for each seed. Mostly an arm; a
            cell that several arms come from (one trained model, many conversions) is one cell.
        run: runs a cell and returns its figures by arm and metric.
        baseline: arms that are compared against.
        ours: arms of the method.
        checks: all must hold; see `harness.statistics`.
        needs: checks without which the miniature says nothing (a baseline that learnt the task):
            where one doesn't hold, the verdict is inconclusive.
        data: describes the data with a digest; also part of what a stored figure depends on.
        seeds: that are judged, paired over all arms.
        grid: what is tuned for each cell; None tunes nothing.
        requires: packages besides torch.
        axes: what the pairs of a "curve" are, for the figure.
        alone: cells that take times, or start processes: they never run beside others.
        again: makes this miniature in another process, to which it can be sent; None is
            `foveate.papers.load(key)`.
        remark: what to make of the kept verdict, where it is refuted or says less than it might.
    """

    key: str
    claim: str
    metric: str
    cells: tuple[str, ...]
    run: Callable[[Trial], Found]
    baseline: tuple[str, ...]
    ours: tuple[str, ...]
    checks: tuple[Check, ...]
    needs: tuple[Check, ...] = ()
    data: Callable[[], str] = lambda: "generated"
    seeds: tuple[int, ...] = (0, 1, 2)
    grid: Grid | None = None
    requires: tuple[str, ...] = ()
    axes: tuple[str, str] = ("step", "validation loss")
    alone: tuple[str, ...] = ()
    again: Callable[[], Paper] | None = None
    remark: str = ""

    def __post_init__(self) -> None:
        if len(set(self.cells)) < len(self.cells) or not self.cells or not self.checks:
            raise ValueError(f"{self.key}: cells must be distinct, and there must be checks")
        if set(self.baseline) & set(self.ours):
            raise ValueError(f"{self.key}: an arm is both baseline and ours")
        if set(self.alone) - set(self.cells):
            raise ValueError(f"{self.key}: cells that run alone must be cells")
        if self.grid is not None and self.grid.seed in self.seeds:
            raise ValueError(f"{self.key}: tuned on a seed that is judged")

    @property
    def holds_if(self) -> str:
        """All conditions in words, as they stand before the run."""
        said = "; ".join(check.text for check in self.checks)
        if self.needs:
            said += "; says nothing unless " + " and ".join(check.text for check in self.needs)
        return said
