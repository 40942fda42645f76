"""Polynomials in place of exp on [-R, R], and how good they are there.

    Taylor      c_t = 1 / t!: best near 0, positive everywhere if the degree is even
    Chebyshev   e^{R y} = I_0(R) + 2 sum_k I_k(R) T_k(y), cut at the degree: best in the worst case

The degree that relative error e needs on [-R, R] is Theta(max(R, log(1/e) / log(log(1/e) / R)))
(Aggarwal and Alman 2022, which Alman and Song build on); here it is found by trying. If every
weight is off by a factor within 1 +- e, the output is off by at most 2 e / (1 - e) of the largest
value, so an output tolerance t asks for e = t / (2 + t). Rounding errs, too, by e^(2 R) times the
machine's epsilon: beyond R = 4 or so features are in fp64 (see `Polynomial.condition`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveate.ops.errors import InputError

KINDS = ("taylor", "chebyshev")
MOST = 60  # degree that is tried
_POINTS = 2049


@dataclass(frozen=True)
class Polynomial:
    """sum_t coefficients[t] x^t, made for |x| <= radius."""

    coefficients: tuple[float, ...]
    radius: float

    @property
    def degree(self) -> int:
        """Its degree g."""
        return len(self.coefficients) - 1

    def __call__(self, x: Tensor) -> Tensor:
        """Its values at x, any shape (Horner)."""
        y = torch.full_like(x, self.coefficients[-1])
        for c in reversed(self.coefficients[:-1]):
            y = y * x + c
        return y

    def error(self, radius: float | None = None) -> float:
        """Largest |P(x) / exp(x) - 1| for |x| <= radius, by default its own; found on a grid."""
        x = _grid(self.radius if radius is None else radius)
        return float((self(x) * (-x).exp() - 1).abs().max())

    def condition(self) -> float:
        """Largest sum_t |c_t x^t| / |P(x)| for |x| <= radius; found on a grid.

        Times the machine's epsilon it is the relative error that rounding makes of P: e^(2 radius),
        about, since at -radius terms of up to e^radius cancel to e^-radius.
        """
        x = _grid(self.radius)
        terms = Polynomial(tuple(abs(c) for c in self.coefficients), self.radius)
        return float((terms(x.abs()) / self(x).abs()).max())

    def least(self) -> float:
        """Its least value for |x| <= radius; found on a grid."""
        return float(self(_grid(self.radius)).min())


def polynomial(kind: str, degree: int, radius: float) -> Polynomial:
    """The polynomial of a kind and degree for |x| <= radius.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"polynomial({kind!r}): expected {' or '.join(KINDS)}.")
    if kind == "taylor" or not radius:
        return Polynomial(tuple(1 / math.factorial(t) for t in range(degree + 1)), radius)
    return Polynomial(_chebyshev(degree, radius), radius)


def degree_for(kind: str, radius: float, error: float) -> int:
    """The lowest degree whose relative error on [-radius, radius] is at most `error`.

    Even ones only for Taylor, which are positive everywhere.

    Raises:
        InputError: none up to MOST is enough; the logits are too large to be approximated.
    """
    for degree in range(0, MOST + 1, 2 if kind == "taylor" else 1):
        if polynomial(kind, degree, radius).error() <= error:
            return degree
    raise InputError(
        f"tensor-attention: logits may reach {radius:.3g} in size, where no polynomial of degree "
        f"{MOST} or less is within {error:.1g} of exp; keep queries and keys smaller (normalise "
        "them, or lower the scale), raise the tolerance, or take form='exact'."
    )


def output_error(error: float) -> float:
    """Largest error of an output, as a share of the largest |value|, from that of the weights."""
    return math.inf if error >= 1 else 2 * error / (1 - error)


def weight_error(tolerance: float) -> float:
    """The relative error of the weights that an output tolerance allows."""
    return math.inf if tolerance == math.inf else tolerance / (2 + tolerance)


@lru_cache(maxsize=256)
def _chebyshev(degree: int, radius: float) -> tuple[float, ...]:
    """Coefficients in powers of x of the truncated Chebyshev series of exp on [-radius, radius]."""
    count = 4 * (degree + 16)
    angle = (torch.arange(count, dtype=torch.float64) + 0.5) * (math.pi / count)
    values = (radius * angle.cos()).exp()
    series = [
        float((values * (k * angle).cos()).mean()) * (2 if k else 1) for k in range(degree + 1)
    ]
    total = [0.0] * (degree + 1)
    before, now = [1.0], [0.0, 1 / radius]  # T_0 and T_1 of x / radius
    for k, c in enumerate(series):
        for t, a in enumerate(before):
            total[t] += c * a
        following = [0.0] + [2 / radius * a for a in now]
        for t, a in enumerate(before):
            following[t] -= a
        before, now = now, following
        assert k <= degree
    return tuple(total)


@lru_cache(maxsize=64)
def _grid(radius: float) -> Tensor:
    """Points of [-radius, radius], both ends among them, dense near the ends."""
    return radius * torch.linspace(0, math.pi, _POINTS, dtype=torch.float64).cos()
