"""Where a query's anchors and spans stand, and how many pairs that makes: integers only.

    floor_pow(m) = floor(m^(1/p));   W = floor_pow(w_i + 1) - 1
    a_m = t + 1 - floor_pow(m),  m = w_i + 1, w_i + 2, ... while a_m >= first valid position
    reach(b, n) = ceil(b n^p_s)

Anchors stand at most n^(1-p) / p apart, so that spans that reach back b_b n^p_s >= n^(1-p) / p
cover everything: b_b = 2 for p = p_s = 1/2.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_SNAP = 1e-9  # relative; powers this near to a whole number are that number


def floor_pow(m: int, power: float) -> int:
    """floor(m^(1/power)): exact where 1/power is a whole number from 1 to 6.

    Elsewhere it is formed in float64, and what lies within 1e-9 (relative) below a whole number
    counts as that number.
    """
    root = round(1 / power)
    if 1 <= root <= 6 and math.isclose(root * power, 1.0, rel_tol=1e-12):
        return int(m) ** root
    value = float(m) ** (1 / power)
    return math.floor(value * (1 + _SNAP))


@lru_cache(maxsize=256)
def distances(length: int, power: float, first: int) -> tuple[int, ...]:
    """Distances t - a_m, m >= first, of all anchors that `length` tokens can have, rising."""
    found = []
    m = first
    while (distance := floor_pow(m, power) - 1) < length:
        found.append(distance)
        m += 1
    return tuple(found)


def window_length(index: int, power: float) -> int:
    """W for the window index w_i; 0 is no window."""
    return floor_pow(index + 1, power) - 1


def reach(factor: float, count: Tensor, power: float) -> Tensor:
    """ceil(factor count^power), int64; count (...) int64 is n_t.

    Formed in float64; what lies within 1e-9 (relative) above a whole number counts as that number.
    """
    value = factor * count.clamp_min(0).double().pow(power)
    return torch.ceil(value * (1 - _SNAP)).long()


class Counts(NamedTuple):
    """(query, key) pairs of one head: scored by the search, in spans, in windows."""

    search: int
    span: int
    window: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.search + self.span + self.window


def counted(
    length: int,
    *,
    power: float = 0.5,
    span_power: float = 0.5,
    backward: float = 2.0,
    forward: float = 0.0,
    spans: int = 3,
    index: int = 0,
) -> Counts:
    """The most pairs that a head works on over a whole sequence; arguments as in `Superlinear`.

    Spans are those of the nearest anchors, of which the fewest are cut at the first token.
    """
    window = window_length(index, power)
    behind = torch.tensor(distances(length, power, index + 1), dtype=torch.int64)
    t = torch.arange(length)
    span = 0
    for distance in behind[:spans].tolist():
        anchor = t - distance
        start = (anchor - reach(backward, t + 1, span_power)).clamp_min(0)
        end = (anchor + reach(forward, t + 1, span_power)).minimum(t).minimum(t - window)
        span += int((end - start + 1)[anchor >= 0].sum())
    search = int(torch.searchsorted(behind, t, right=True).sum())
    return Counts(search, span, int((t + 1).clamp_max(window).sum()))


def read(t: int, *, power: float = 0.5, span_power: float = 0.5, backward: float = 2.0,
         forward: float = 0.0, spans: int = 3, index: int = 0) -> tuple[int, int]:  # fmt: skip
    """What decoding token t reads: (keys that are scored, keys and values that are attended to)."""
    n = torch.tensor(t + 1)
    size = int(reach(backward, n, span_power)) + 1 + int(reach(forward, n, span_power))
    anchors = len(distances(t + 1, power, index + 1))
    return anchors, spans * min(size, t + 1) + min(window_length(index, power), t + 1)
