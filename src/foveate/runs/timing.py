"""Paired runs: contestants take turns in one process, and ratios are taken turn by turn.

What disturbs the machine then disturbs both sides of a ratio alike. Speeds that stand in different
rounds are never divided by each other.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

CLOCKS = ("wall", "cpu")


@dataclass
class Samples:
    """Seconds of one call in each round: by the clock on the wall, and of all cores together."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    calls: int = 1

    def by(self, clock: str) -> list[float]:
        """The samples of one clock."""
        return self.wall if clock == "wall" else self.cpu


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Attributes:
        repeats: rounds, each contestant once a round.
        sample: seconds that a sample lasts at least; shorter calls are repeated within it.
        budget: seconds after which no further round begins, though at least three are run.
        clock: "wall", or "cpu" (processor time of all threads: steadier on a busy machine, and
            the same thing on a quiet one with one thread).
    """

    repeats: int = 7
    sample: float = 0.01
    budget: float = 60.0
    clock: str = "wall"


def race(calls: Mapping[str, Callable[[], object]], pace: Pace) -> dict[str, Samples]:
    """Time every call, round by round, each round beginning with the next contestant."""
    samples: dict[str, Samples] = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        samples[name] = Samples(calls=max(1, math.ceil(pace.sample / max(once, 1e-7))))
    order = list(calls)
    began = time.perf_counter()
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        for turn in range(pace.repeats):
            if turn >= 3 and time.perf_counter() - began > pace.budget:
                break
            for name in order:
                call, sample = calls[name], samples[name]
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(sample.calls):
                    call()
                sample.wall.append((time.perf_counter() - wall) / sample.calls)
                sample.cpu.append((time.process_time() - cpu) / sample.calls)
            order = order[1:] + order[:1]
    finally:
        if was_on:
            gc.enable()
    return samples


def trial(calls: Mapping[str, Callable[[], object]], clock: str) -> dict[str, float]:
    """Seconds of each call, the better of two in turn: enough to tell far slower ones."""
    best = dict.fromkeys(calls, math.inf)
    now = time.perf_counter if clock == "wall" else time.process_time
    for _ in range(2):
        for name, call in calls.items():
            start = now()
            call()
            best[name] = min(best[name], now() - start)
    return best


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 0.2 and 0.8 quantiles, as the benchmark reports them."""
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(points).tolist()
    return {"median": middle, "q20": low, "q80": high}


def paired(above: Sequence[float], below: Sequence[float], factor: float = 1.0) -> dict[str, float]:
    """Spread of factor * above / below, round by round.

    With the seconds of a base above and of a contestant below, it's how many times faster the
    contestant is; with factor = the share of the work that it does, its share of the ideal.
    """
    return spread([factor * a / b for a, b in zip(above, below, strict=True)])
