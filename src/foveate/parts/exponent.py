"""The power of the length that counted or measured work grows with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from foveate.ops.errors import InputError


def exponent(lengths: Sequence[int], work: Sequence[float]) -> float:
    """The slope of a line through the logarithms, by least squares.

    Args:
        lengths: two or more different ones.
        work: at each of them, above 0.

    Raises:
        InputError: fewer, or numbers that have no logarithm.
    """
    if len(lengths) != len(work) or len(set(lengths)) < 2 or min(*lengths, *work) <= 0:
        raise InputError(f"exponent: expected work above 0 at two lengths or more, got {work}.")
    x, y = (torch.tensor(z, dtype=torch.float64).log() for z in (lengths, work))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())
