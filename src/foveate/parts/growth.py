"""How fast counted work grows with the length: the exponent of a power law."""

from __future__ import annotations

import math
from collections.abc import Sequence

from foveate.ops.errors import InputError


def exponent(lengths: Sequence[float], work: Sequence[float]) -> float:
    """Slope of log work over log length, by least squares.

    Args:
        lengths: at least two different ones, above 0.
        work: counted at each, above 0.

    Raises:
        InputError: fewer, or numbers that have no logarithm.
    """
    if len(lengths) != len(work) or len(set(lengths)) < 2 or min(*lengths, *work) <= 0:
        raise InputError(
            f"exponent: expected two or more different lengths and the work at each, above 0, got "
            f"{list(lengths)} and {list(work)}."
        )
    x, y = ([math.log(value) for value in values] for values in (lengths, work))
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    across = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return across / math.fsum((a - mean_x) ** 2 for a in x)
