"""Recall and needle: small models that differ in their attention alone, on an equal budget.

Every method meets dense attention, a small window, and a window of equal cost: the narrowest one
whose attention has at least as many operations as the method's, all it computes to choose or
summarise keys included. Where that is the whole sequence, the method saves nothing at this length
and is held against dense attention. Data and their order, steps and tuning are the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from foveate.nn import Attention
from foveate.ops import causal
from foveate.ops.errors import InputError, nearest
from foveate.papers.harness import Check, Found, Grid, Paper, Trial, at_least
from foveate.papers.tasks import FillerRecall, Needle
from foveate.papers.tasks.base import Generated
from foveate.papers.training.language import REQUIRES, Sizes, language_model
from foveate.papers.training.loop import train
from foveate.papers.training.objective import evaluate
from foveate.papers.training.regime import Regime
from foveate.runs.growth import TRAINED, at_length
from foveate.runs.work import Work

LENGTH = 128
TASKS: dict[str, Generated] = {
    "recall": FillerRecall(length=LENGTH, pairs=4, spread=100),
    "needle": Needle(length=LENGTH, needles=1, keys=4, outside=48),
}
SMALL = {
    "dma": "dma(window=16)",
    "superlinear": "superlinear",
    "sea": "sea(k=16, width=32, max_length={n})",
    "routing-transformer": "routing-transformer(clusters=8, window=16, block=16)",
    "combiner": "combiner(size={root})",
}
DENSE, MOST = "dense", 2500


@dataclass(frozen=True)
class Contest:
    """What is compared.

    Attributes:
        methods: keys (those of `SMALL` get budgets that fit the length), or texts as
            `foveate.Attention` takes them, with {n}, {root} and {rest}.
        tasks: recall, needle.
        steps: of each training, at most 2,500.
        rates: learning rates; of several, each arm's best one on a seed of its own is taken. Each
            costs a whole training of each arm.
        seeds: that are judged.
        small: keys that the small window sees.
        layers, dim, heads, batch: of the models and their training.

    Raises:
        InputError: an unknown task, or a number out of its range.
    """

    methods: tuple[str, ...] = TRAINED
    tasks: tuple[str, ...] = tuple(TASKS)
    steps: int = 2000
    rates: tuple[float, ...] = (1e-3, 3e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    small: int = 16
    layers: int = 2
    dim: int = 64
    heads: int = 2
    batch: int = 32

    def __post_init__(self) -> None:
        for name in ("methods", "tasks", "rates", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise InputError(f"{name}: expected one or more, each once; got {given}.")
        for task in self.tasks:
            if task not in TASKS:
                raise InputError(f"task {task!r} is not known; {nearest(task, TASKS)}")
        if not 1 <= self.steps <= MOST:
            raise InputError(f"steps: expected 1 to {MOST}, got {self.steps}.")
        if not 1 <= self.small < LENGTH:
            raise InputError(f"small: expected 1 to {LENGTH - 1}, got {self.small}.")

    def text(self, method: str) -> str:
        """The attention of a method."""
        return at_length(SMALL.get(method, method), LENGTH)

    @property
    def arms(self) -> dict[str, str]:
        """The attention of each arm: dense, windows, methods."""
        found = {DENSE: "full", name_of(self.small): window_text(self.small)}
        for method in self.methods:
            keys = self.equal(method)
            if keys < LENGTH:
                found[name_of(keys)] = window_text(keys)
        return found | {method: self.text(method) for method in self.methods}

    def equal(self, method: str) -> int:
        """Keys of the window of equal cost, LENGTH if that is dense attention."""
        return window_of(cost(self.text(method), self.dim, self.heads), self.dim)

    def rival(self, method: str) -> str:
        """The arm of equal cost."""
        keys = self.equal(method)
        return DENSE if keys >= LENGTH else name_of(keys)


def name_of(keys: int) -> str:
    """The arm of a window."""
    return f"window {keys}"


def window_text(keys: int) -> str:
    """The attention of a window."""
    return f"sink-window(sinks=0, window={keys})"


@lru_cache(maxsize=64)
def cost(text: str, dim: int, heads: int) -> float:
    """Operations of an attention in a layer on one sequence, forward, without the layer's maps."""
    dense = 2.0 * causal().pairs(LENGTH, LENGTH) * 2 * dim
    return _layer(text, dim, heads) - _layer("full", dim, heads) + dense


@torch.no_grad()
def _layer(text: str, dim: int, heads: int) -> float:
    with torch.random.fork_rng(), Work() as work:
        torch.manual_seed(0)
        layer = Attention(dim, heads, attention=text, position="none")
        before = work.flops  # what it took to make the weights
        layer(torch.randn(1, LENGTH, dim), mask=causal())
    return work.flops - before


def window_of(operations: float, dim: int) -> int:
    """The narrowest causal window whose attention takes at least so many operations."""
    for keys in range(1, LENGTH):
        pairs = keys * LENGTH - keys * (keys - 1) // 2
        if 2.0 * pairs * 2 * dim >= operations:
            return keys
    return LENGTH


@dataclass(frozen=True)
class Runner:
    """Trains a cell of a contest."""

    contest: Contest

    def __call__(self, trial: Trial) -> Found:
        """Train one arm on one task."""
        contest = self.contest
        name, _, arm = trial.cell.partition(": ")
        task = TASKS[name]
        if trial.quick:
            task = replace(task, held=16)  # type: ignore[type-var]
        sizes = Sizes(contest.layers, contest.dim, contest.heads, LENGTH, task.vocab)
        model = language_model(sizes, attention=contest.arms[arm]).to(trial.device)
        steps = trial.steps(contest.steps)
        regime = Regime(
            steps=steps,
            batch=contest.batch,
            lr=contest.rates[0] if trial.tuned is None else trial.tuned,
            every=max(2, steps // 5),
            seed=trial.seed,
        )
        done = train(model, task, regime, folder=trial.folder, tell=trial.tell)
        found: dict[str, Any] = {
            "accuracy": evaluate(model, task, "test", contest.batch)["accuracy"],
            "validation": done.history[-1]["validation"],
            "parameters": float(sum(p.numel() for p in model.parameters())),
            "MFLOP": cost(contest.arms[arm], contest.dim, contest.heads) / 1e6,
            "curve": done.curve,
        }
        return {trial.cell: found}


def paper_of(contest: Contest) -> Paper:
    """The contest in the harness's form: a cell for each task and arm, judged over its seeds."""
    arms = contest.arms
    cells = [f"{task}: {arm}" for task in contest.tasks for arm in arms]
    checks: list[Check] = []
    for task in contest.tasks:
        for method in contest.methods:
            checks.append(_apart(task, method, contest.rival(method), 0.0))
            checks.append(_apart(task, method, DENSE, -0.05, refuted=-math.inf))
    return Paper(
        key="recall",
        claim="Sparse attentions that are trained recall what a window of equal cost can't see.",
        metric="accuracy on the test split; operations of one attention on one sequence",
        cells=tuple(cells),
        run=Runner(contest),
        again=partial(paper_of, contest),
        baseline=tuple(c for c in cells if not _is_of(c, contest.methods)),
        ours=tuple(c for c in cells if _is_of(c, contest.methods)),
        checks=tuple(dict.fromkeys(checks)),
        needs=tuple(_learnt(task) for task in contest.tasks),
        requires=REQUIRES,
        data=lambda: _described(contest),
        seeds=contest.seeds,
        grid=Grid("learning rate", contest.rates) if len(contest.rates) > 1 else None,
    )


def _is_of(cell: str, methods: Sequence[str]) -> bool:
    return cell.partition(": ")[2] in methods


def _apart(task: str, one: str, two: str, least: float, **more: Any) -> Check:
    return at_least(
        f"{task}: {one} - {two}",
        lambda at: at[f"{task}: {one}"]["accuracy"] - at[f"{task}: {two}"]["accuracy"],
        least,
        **more,
    )


def _learnt(task: str) -> Check:
    cell = f"{task}: {DENSE}"
    return at_least(cell, lambda at: at[cell]["accuracy"], 0.9)


def _described(contest: Contest) -> str:
    """Data, arms and budget: whatever else a stored figure depends on."""
    tasks = "; ".join(TASKS[name].describe() for name in contest.tasks)
    arms = "; ".join(f"{arm}: {text}" for arm, text in contest.arms.items())
    sizes = f"{contest.layers} layers of {contest.dim}, {contest.heads} heads"
    return f"{tasks}; {sizes}; {contest.steps} steps of {contest.batch}; {arms}"
