"""The loop of a fit: steps that can be cut off anywhere and gone on with, bit by bit."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from functools import cache
from time import perf_counter
from typing import Any

import torch
from torch import nn

from foveate.ops.errors import FoveateError
from foveate.parts.fitting import Progress, State
from foveate.parts.weights import moments, put_moments, put_weights, weights

Step = Callable[[int], dict[str, float]]
_MODEL, _MOMENTS = "model/", "moments/"


class FitError(FoveateError, RuntimeError):
    """A fit went wrong."""


def loop(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Step,
    steps: int,
    progress: Progress,
    state: State,
    *,
    every: int = 10,
    setting: dict[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Run steps 0 ... steps - 1, or those that are left.

    Args:
        module: what is learnt.
        optimizer: over its parameters; `step` moves it.
        step: makes step number n, which alone decides its batch and its noise; returns figures.
        steps: how many.
        progress: hears of each.
        state: where to keep what is needed to go on.
        every: steps between two savings.
        setting: whatever decides the fit; a state of another one is not gone on with.

    Returns:
        The figures of all steps, earlier runs' included.

    Raises:
        FitError: a figure is no finite number.
    """
    history: list[dict[str, float]] = []
    seconds = 0.0
    held = state.load()
    if held is not None and held[0].get("setting") == setting:
        facts, tensors = held
        history, seconds = facts["history"], facts["seconds"]
        put_weights(module, _below(_MODEL, tensors))
        put_moments(module, optimizer, _below(_MOMENTS, tensors))
    start = perf_counter()
    for number in range(len(history), steps):
        found = step(number)
        if not all(math.isfinite(value) for value in found.values()):
            raise FitError(
                f"Step {number} of the fit gave {found}; the text or the model has numbers that "
                "aren't finite, or the learning rate is too high."
            )
        spent = seconds + perf_counter() - start
        history.append(found | {"seconds": round(spent, 3)})
        if (number + 1) % every == 0 or number + 1 == steps:
            tensors = {_MODEL + n: t for n, t in weights(module).items()}
            tensors |= {_MOMENTS + n: t for n, t in moments(module, optimizer).items()}
            state.save({"setting": setting, "history": history, "seconds": spent}, tensors)
            _give_back()
        said = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        progress((number + 1) / steps, said)
    return history


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _give_back() -> None:
    """Hand freed memory back to the system, where glibc would hold on to ever more of it.

    Steps that run two branches of each layer leave holes that it doesn't fill: a fit of Flux at
    1,024 tokens came to hold 23 GB, of which 1 was in use.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others have none
    if trim is not None:
        trim.argtypes = [ctypes.c_size_t]
    found: Callable[[int], int] | None = trim
    return found
