"""Faster neighborhood attention: tiles of queries share what they read, so it pays to skip.

Time of one head of 32 on grids of 64 x 64 and 128 x 128, fp32, one thread, processor time, all
forms taking turns in one run: naive (every query gathers its window), unfused (products over tiles
of windows, weights in memory), fused (tiles in the core op, tokens lying row by row) and dense, the
better of torch's SDPA and the core op over everything.

Counted, in the same sizes: how far the forms are from float64, and the bytes of tensors of one
weight for each query and key of its window, which the unfused form writes twice (scores and
weights) and the fused one never.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.papers.harness import Check, Found, Paper, Trial, at_least, at_most, ratio

SIZES = ((64, 7), (64, 13), (64, 25), (128, 13))
QUICK = ((16, 3), (16, 5), (16, 7), (24, 5))
FORMS = ("naive", "unfused", "fused")
DIM = 32


def run(trial: Trial) -> Found:
    """Time the forms, or count what they write."""
    return speed(trial) if trial.cell == "speed" else counts(trial)


def _cases(quick: bool) -> list[tuple[str, int, int]]:
    """(name of the whole size, side, window)."""
    real = QUICK if quick else SIZES
    return [(f"{n}x{n} k={k}", *small) for (n, k), small in zip(SIZES, real)]


def calls(side: int, window: int, random: torch.Generator) -> dict[str, Callable[[], Tensor]]:
    """All forms on one grid of random tokens, by name."""
    from foveate.methods.fna import FNA, naive, unfused
    from foveate.ops import attention, neighborhood

    mask = neighborhood((side, side), window)
    q, k, v = torch.randn(3, 1, 1, mask.tokens, DIM, generator=random).unbind(0)
    method = FNA(window, shape=mask.shape)
    exact_q, exact_k, exact_v = (x.double() for x in (q, k, v))
    return {
        "naive": lambda: naive(q, k, v, mask).out,
        "unfused": lambda: unfused(q, k, v, mask).out,
        "fused": lambda: method(q, k, v).out,
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "dense": lambda: attention(q, k, v).out,
        "exact": lambda: attention(exact_q, exact_k, exact_v, mask, backend="blocks").out,
    }


@torch.no_grad()
def speed(trial: Trial) -> Found:
    """Processor seconds of every form, median of rounds in which they take turns."""
    from foveate.runs.timing import Pace, race

    found: dict[str, dict[str, Any]] = {arm: {} for arm in (*FORMS, "dense")}
    random = torch.Generator().manual_seed(trial.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, (name, side, window) in enumerate(_cases(trial.quick)):
            trial.tell(number / len(SIZES), f"{side} x {side}, window {window}")
            contestants = calls(side, window, random)
            del contestants["exact"]
            samples = race(contestants, Pace(repeats=3))
            seconds = {form: median(sample.cpu) for form, sample in samples.items()}
            seconds["dense"] = min(seconds["dense"], seconds.pop("sdpa"))
            for form, value in seconds.items():
                found[form][f"seconds {name}"] = value
    finally:
        torch.set_num_threads(threads)
    return found


class _Weights(TorchDispatchMode):
    """Bytes of all tensors that have one number for each query and key of its window."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.bytes = numbers, 0
        self._kept: dict[int, Tensor] = {}  # held, so that no other tensor takes their place

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and look at what it made."""
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel() == self.numbers:
                place = x.untyped_storage().data_ptr()
                if place not in self._kept:
                    self._kept[place] = x
                    self.bytes += x.untyped_storage().nbytes()
        return out


@torch.no_grad()
def counts(trial: Trial) -> Found:
    """Largest error of each form, and bytes of weights that it writes, over one weight's bytes."""
    found: dict[str, dict[str, Any]] = {f"{arm} counted": {} for arm in FORMS}
    for name, side, window in _cases(trial.quick):
        trial.tell(0.0, f"counting {side} x {side}, window {window}")
        made = calls(side, window, torch.Generator().manual_seed(0))
        exact = made["exact"]()
        for arm in FORMS:
            with _Weights(side**2 * window**2) as seen:
                out = made[arm]()
            mine = found[f"{arm} counted"]
            mine[f"error {name}"] = float((out.double() - exact).abs().max())
            mine[f"writes {name}"] = seen.bytes / (4 * side**2 * window**2)
    return found


def _times(name: str) -> Callable[[Found], float]:
    metric = f"seconds {name}"
    return lambda at: at["naive"][metric] / at["fused"][metric]


def _grows(one: str, two: str) -> Check:
    return at_least(
        f"naive / fused: {two} over {one}", lambda at: _times(two)(at) / _times(one)(at), 1.0
    )


def _error(arm: str, name: str) -> Check:
    def error(at: Found) -> float:
        return float(at[f"{arm} counted"][f"error {name}"])

    return at_most(f"error of {arm}, {name}", error, 1e-5, exact=True)


def _counted(name: str) -> tuple[Check, ...]:
    def unfused(at: Found) -> float:
        return float(abs(at["unfused counted"][f"writes {name}"] - 2))

    def fused(at: Found) -> float:
        return float(at["fused counted"][f"writes {name}"])

    return (
        *(_error(arm, name) for arm in FORMS),
        at_most(f"|writes of weights: unfused - 2|, {name}", unfused, 0.0, exact=True),
        at_most(f"writes of weights: fused, {name}", fused, 0.0, exact=True),
    )


NAMES = tuple(name for name, _, _ in _cases(False))
PAPER = Paper(
    key="fna",
    claim="Fused neighborhood attention is faster than the naive form, the more so the larger the "
    "window, keeps no weights in memory, and is faster than dense attention.",
    metric="processor seconds of one head of 32, fp32, one thread; bytes of weights written",
    cells=("counts", "speed"),
    run=run,
    baseline=("naive", "dense", "naive counted"),
    ours=("fused", "unfused", "fused counted", "unfused counted"),
    checks=(
        *(ratio("naive", "fused", 1.0, f"seconds {name}") for name in NAMES),
        _grows(NAMES[0], NAMES[1]),
        _grows(NAMES[1], NAMES[2]),
        ratio("dense", "fused", 3.0, f"seconds {NAMES[3]}"),
        *(check for name in NAMES for check in _counted(name)),
    ),
    alone=("speed",),
)
