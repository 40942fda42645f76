"""What random-feature attention is to learn, how complex it is, and the bound on the risk.

    of the query            <beta, x_0>^p
    an average              (1/N) sum_i <beta, x_i>^p
    weighted by correlation (1/N) sum_i <x_0, x_i>^p <beta, x_i>^s
    between the last two    (1 - gamma) f_2 + gamma f_3

    f* = (1/N) sum_i sum_{r,s} <x_0^(r) (x) x_i^(s), f_rs>
    B(f*) = sum_k C_k sum_{max(r,s)=k} ||f_rs||_F^2,   C_k = max(1, k^4.5 4^k)
    L(fhat) - L(f*) <~ sqrt(B(f*)) (sqrt((log(d M) + log(1/delta)) / n)
                                    + sqrt((d^2 + log M) / (delta M)))

The bound holds up to a constant factor, and doesn't depend on N; the MLP's on the concatenated
input grows like (N/2 + 1)^p. C_k and the exponents are as far as the paper's could be recalled.

Tokens are uniform on the unit sphere, so <beta, x> has variance 1/d and targets of a high degree
hardly vary: errors are to be taken as shares of a target's variance.

Fu et al. 2023, arXiv 2307.11353.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops.errors import InputError


@dataclass(frozen=True)
class Target:
    """A function of a query and its keys that doesn't depend on the keys' order.

    Attributes:
        name: in formulas.
        value: from beta (d,), query (n, d), keys (n, N, d) to f* (n,).
        norms: ||f_rs||_F^2 by (r, s), for |beta| = 1; see `complexity`.
    """

    name: str
    value: Callable[[Tensor, Tensor, Tensor], Tensor]
    norms: Mapping[tuple[int, int], float]


def of_query(p: int) -> Target:
    """<beta, x_0>^p."""
    return Target(f"<b,x0>^{p}", lambda b, q, k: (q @ b) ** p, {(p, 0): 1.0})


def average(p: int) -> Target:
    """The mean over keys of <beta, x_i>^p."""
    return Target(f"mean <b,xi>^{p}", lambda b, q, k: ((k @ b) ** p).mean(1), {(0, p): 1.0})


def correlated(p: int, s: int, dim: int) -> Target:
    """The mean over keys of <x_0, x_i>^p <beta, x_i>^s, for tokens of width dim.

    Its tensor is I^(p) (x) beta^(s) with p indices of the query: ||f||_F^2 = d^p.
    """
    name = f"mean <x0,xi>^{p}" + ("" if not s else f" <b,xi>^{s}")

    def value(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k @ q[..., None])[..., 0] ** p * (k @ b) ** s).mean(1)

    return Target(name, value, {(p, p + s): float(dim**p)})


def between(first: Target, second: Target, gamma: float) -> Target:
    """(1 - gamma) of one and gamma of another, whose tensors are of different degrees.

    Raises:
        InputError: gamma outside [0, 1], or they share a degree (r, s).
    """
    if not 0 <= gamma <= 1 or set(first.norms) & set(second.norms):
        raise InputError(
            f"between({first.name!r}, {second.name!r}, {gamma}): expected 0 to 1 of targets "
            "without a common degree."
        )
    norms = {at: (1 - gamma) ** 2 * norm for at, norm in first.norms.items()}
    norms |= {at: gamma**2 * norm for at, norm in second.norms.items()}
    return Target(
        f"{1 - gamma:g} {first.name} + {gamma:g} {second.name}",
        lambda b, q, k: (1 - gamma) * first.value(b, q, k) + gamma * second.value(b, q, k),
        norms,
    )


def targets(dim: int) -> tuple[Target, ...]:
    """Six functions of tokens of width dim."""
    return (
        of_query(2),
        average(2),
        average(3),
        correlated(1, 1, dim),
        correlated(2, 1, dim),
        correlated(3, 0, dim),
    )


def complexity(norms: Mapping[tuple[int, int], float]) -> float:
    """B(f*), from ||f_rs||_F^2 by (r, s).

    Raises:
        InputError: a negative degree or norm.
    """
    total = 0.0
    for (r, s), norm in norms.items():
        if r < 0 or s < 0 or norm < 0:
            raise InputError(f"complexity: ({r}, {s}) with {norm}; expected nothing negative.")
        k = max(r, s)
        total += max(1.0, k**4.5 * 4.0**k) * norm
    return total


def excess_risk_bound(
    b: float, n: int, heads: int, dim: int, delta: float = 0.05, *, constant: float = 1.0
) -> float:
    """The bound on L(fhat) - L(f*) that holds with probability 1 - delta.

    Args:
        b: B(f*).
        n: examples.
        heads: M.
        dim: d.
        delta: 0 to 1.
        constant: the factor that the theorem leaves open.

    Raises:
        InputError: a number out of its range.
    """
    if b < 0 or min(n, heads, dim) < 1 or not 0 < delta < 1 or constant <= 0:
        raise InputError(
            f"excess_risk_bound(b={b}, n={n}, heads={heads}, dim={dim}, delta={delta}): expected "
            "b of at least 0, sizes of at least 1, delta between 0 and 1 and a constant above 0."
        )
    few = math.sqrt((math.log(dim * heads) + math.log(1 / delta)) / n)
    narrow = math.sqrt((dim**2 + math.log(heads)) / (delta * heads))
    return constant * math.sqrt(b) * (few + narrow)


def on_sphere(
    count: int, length: int, dim: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Examples: query (count, dim) and keys (count, length, dim), uniform on the unit sphere."""
    x = torch.randn(count, length + 1, dim, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=-1, keepdim=True)
    return x[:, 0], x[:, 1:]
