"""Tensor attention in near-linear time: monomial features of a polynomial in place of exp.

For P_g(x) = sum_t c_t x^t and every multi-index alpha with |alpha| <= g,

    U1[i, alpha] = c_|alpha| scale^|alpha| (|alpha|! / prod alpha_l!) prod_l Q[i, l]^alpha_l
    U2[j, alpha] = prod_l K1[j, l]^alpha_l,      U3[j, alpha] = prod_l K2[j, l]^alpha_l

give U1 (U2 (x) U3)^T = P_g(scale Q (K1 (x) K2)^T) exactly, with rank r = C(d + g, g). Since
(U2 (x) U3)^T (V1 (x) V2) = (U2^T V1) * (U3^T V2), elementwise,

    out = U1 [(U2^T V1) * (U3^T V2)] / U1 [(U2^T 1) * (U3^T 1)]

in O(n r dv); causal attention takes prefix sums of each factor, multiplied after summing. A column
of ones beside each value carries the denominator. Order k has k - 1 factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate.methods.tensor_attention.polynomial import Polynomial
from foveate.ops import AttentionOutput

_BUDGET = 1 << 22  # numbers of the prefix sums that are held at a time


Sums = tuple[Tensor, ...]  # of each factor, (B, Hkv, r, Dv + 1)


class Monomials(NamedTuple):
    """All monomials of degree <= g in d variables, each one degree's after the other's.

    Attributes:
        parents: for each degree t >= 1, which monomial of degree t - 1 it extends, (count,).
        factors: and by which variable.
        degree: |alpha| of each, (r,).
        multinomial: |alpha|! / prod alpha_l! of each, (r,), float64.
    """

    parents: tuple[Tensor, ...]
    factors: tuple[Tensor, ...]
    degree: Tensor
    multinomial: Tensor


def rank(width: int, degree: int) -> int:
    """The number of features, r = C(d + g, g)."""
    return math.comb(width + degree, degree)


@lru_cache(maxsize=32)
def monomials(width: int, degree: int) -> Monomials:
    """The table for d = width and g = degree."""
    parents: list[Tensor] = []
    factors: list[Tensor] = []
    degrees, counts = [0], [1.0]
    known: dict[tuple[int, ...], int] = {(): 0}
    for t in range(1, degree + 1):
        following: dict[tuple[int, ...], int] = {}
        above, by = [], []
        for number, alpha in enumerate(combinations_with_replacement(range(width), t)):
            following[alpha] = number
            above.append(known[alpha[:-1]])
            by.append(alpha[-1])
            degrees.append(t)
            repeats = math.prod(math.factorial(alpha.count(x)) for x in set(alpha))
            counts.append(math.factorial(t) / repeats)
        known = following
        parents.append(torch.tensor(above))
        factors.append(torch.tensor(by))
    return Monomials(
        tuple(parents), tuple(factors), torch.tensor(degrees),
        torch.tensor(counts, dtype=torch.float64),
    )  # fmt: skip


def key_features(x: Tensor, degree: int) -> Tensor:
    """prod_l x_l^alpha_l for all alpha: (..., d) -> (..., r)."""
    table = monomials(x.shape[-1], degree)
    parts = [torch.ones_like(x[..., :1])]
    for parents, factors in zip(table.parents, table.factors):
        at, by = parents.to(x.device), factors.to(x.device)
        parts.append(parts[-1].index_select(-1, at) * x.index_select(-1, by))
    return torch.cat(parts, -1)


def query_features(q: Tensor, p: Polynomial, scale: float) -> Tensor:
    """U1 of q (..., d): (..., r)."""
    table = monomials(q.shape[-1], p.degree)
    c = torch.tensor(p.coefficients, dtype=torch.float64)
    factor = c[table.degree] * scale ** table.degree.double() * table.multinomial
    return key_features(q, p.degree) * factor.to(q)


def sums(keys: Sequence[Tensor], values: Sequence[Tensor], real: Tensor | None, g: int) -> Sums:
    """For each factor U^T [V, 1] over all tokens: (B, Hkv, r, Dv + 1).

    Args:
        keys: each (B, Hkv, n, D).
        values: each (B, Hkv, n, Dv).
        real: (1 or B, n) bool, False on padding; None is all real.
        g: degree.
    """
    return tuple(_weighted(k, real, g).mT @ _with_ones(v) for k, v in zip(keys, values))


def read(u1: Tensor, product: Tensor) -> AttentionOutput:
    """From U1 (B, Hq, n, r) and the product of the sums (B, Hkv, r, Dv + 1)."""
    return _divided(_grouped(u1, product.shape[1]) @ product[:, :, None])


def full(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    p: Polynomial,
    scale: float,
    real: Tensor | None = None,
) -> AttentionOutput:
    """Every query sees all real tokens; shapes as in `causal_scan`."""
    total = _product(sums(keys, values, real, p.degree))
    return read(query_features(q, p, scale), total)


def causal_scan(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    p: Polynomial,
    scale: float,
    real: Tensor | None = None,
    before: Sums | None = None,
) -> tuple[AttentionOutput, Sums]:
    """Query i sees all tuples of real tokens j <= i, and those that `before` sums up.

    Args:
        q: (B, Hq, n, D), in fp32 or wider.
        keys: each (B, Hkv, n, D).
        values: each (B, Hkv, n, Dv).
        p: in place of exp.
        scale: factor on the logits.
        real: (1 or B, n) bool; None is all real.
        before: sums over earlier tokens.

    Returns:
        out (B, Hq, n, Dv), lse (B, Hq, n) of P's sums, and the sums over all tokens.
    """
    m = len(keys)
    if before is None:
        before = sums([k[:, :, :0] for k in keys], [v[:, :, :0] for v in values], None, p.degree)
    each = before[0].shape[0] * before[0].shape[1] * before[0].shape[2] * before[0].shape[3]
    size = max(1, _BUDGET // max(1, each))
    outs, lses = [], []
    for first in range(0, q.shape[2], size):
        new = slice(first, first + size)
        own = None if real is None else real[:, new]

        def run(q: Tensor, *rest: Tensor, own: Tensor | None = own) -> tuple[Tensor, ...]:
            held, k, v = rest[:m], rest[m : 2 * m], rest[2 * m :]
            steps = tuple(
                past[:, :, None]
                + (_weighted(x, own, p.degree)[..., None] * _with_ones(y)[..., None, :]).cumsum(2)
                for past, x, y in zip(held, k, v)
            )
            u1 = _grouped(query_features(q, p, scale), k[0].shape[1])
            summed = torch.einsum("bhgnr,bhnrc->bhgnc", u1, _product(steps))
            return (*_divided(summed), *(x[:, :, -1].clone() for x in steps))

        given: list[Any] = [q[:, :, new], *before, *(x[:, :, new] for x in (*keys, *values))]
        if torch.is_grad_enabled():
            found = checkpoint(run, *given, use_reentrant=False)
        else:
            found = run(*given)
        outs.append(found[0])
        lses.append(found[1])
        before = tuple(found[2:])
    if not outs:
        return AttentionOutput(values[0].new_zeros(*q.shape[:3], values[0].shape[3]),
                               q.new_zeros(q.shape[:3])), before  # fmt: skip
    return AttentionOutput(torch.cat(outs, 2), torch.cat(lses, 2)), before


def _product(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total * part
    return total


def _weighted(k: Tensor, real: Tensor | None, degree: int) -> Tensor:
    """Features of keys, 0 where a token isn't real."""
    u = key_features(k, degree)
    return u if real is None else u.masked_fill(~real[:, None, :, None], 0.0)


def _with_ones(v: Tensor) -> Tensor:
    return torch.cat((v, torch.ones_like(v[..., :1])), -1)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, ...) -> (B, Hkv, group, ...)."""
    return x.unflatten(1, (kv_heads, -1))


def _divided(summed: Tensor) -> AttentionOutput:
    """From numerator and denominator, (B, Hkv, group, n, Dv + 1); 0 where nothing is seen."""
    summed = summed.flatten(1, 2)
    total = summed[..., -1:]
    empty = total == 0
    out = summed[..., :-1] / total.masked_fill(empty, 1.0)
    lse = total.masked_fill(empty, 1.0).log().masked_fill(empty, -torch.inf)
    return AttentionOutput(out, lse[..., 0])
