"""How the time of something grows with the length, measured: seconds and a fitted exponent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log
from statistics import median

import torch
from torch import Tensor, nn

from foveate.ops import causal
from foveate.parts.growth import exponent
from foveate.runs.timing import Pace, race


def forward_backward(layer: nn.Module, length: int, dim: int) -> Callable[[], object]:
    """One training pass of a layer, x (1, length, dim), as a call to time."""
    x = torch.randn(1, length, dim)
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def call() -> tuple[Tensor, ...]:
        y = layer(x, mask=causal()).y
        return torch.autograd.grad(y.sum(), parameters)

    return call


def growth(
    arms: Mapping[str, tuple[nn.Module, float]], lengths: Sequence[int], dim: int, repeats: int = 3
) -> dict[str, dict[str, float]]:
    """Seconds of forward and backward at each length, and the exponent that they grow with.

    All arms and lengths take turns in one run.

    Args:
        arms: layers such as foveate.Attention, of width `dim`, and the exponent that theory gives
            their time at great lengths.
        lengths: in ascending order, two or more.
        dim: width.
        repeats: rounds; the median counts.

    Returns:
        By arm: "seconds <length>", "exponent" (least squares of log seconds over log length),
        "in theory" (as given) and "doubling" (the worst ratio of neighbours, per doubling).
    """
    calls = {
        f"{arm} {n}": forward_backward(layer, n, dim)
        for arm, (layer, _) in arms.items()
        for n in lengths
    }
    samples = race(calls, Pace(repeats=repeats))
    found = {}
    for arm, (_, theory) in arms.items():
        seconds = [median(samples[f"{arm} {n}"].wall) for n in lengths]
        steps = [
            (later / one) ** (log(2) / log(n / m))
            for one, later, m, n in zip(seconds, seconds[1:], lengths, lengths[1:])
        ]
        found[arm] = {f"seconds {n}": s for n, s in zip(lengths, seconds)} | {
            "exponent": exponent(lengths, seconds),
            "in theory": theory,
            "doubling": max(steps),
        }
    return found
