"""The kernel that random-feature attention becomes with infinitely many heads.

    kappa_1(rho) = (sqrt(1 - rho^2) + rho (pi - arccos rho)) / (2 pi)
    K(x, x') = (1/N^2) sum_{i,j} kappa_1(rho_ij) (x~_i . x~'_j),
    rho_ij = (x~_0 . x~'_0) (x~_i . x~'_j) / 4

kappa_1 is E[sigma(a) sigma(b)] of standard normal a, b with correlation rho: the arc-cosine kernel
of order 1 (Cho and Saul 2009). It is the limit of (1/M) sum_m phi_m . phi_m' before the scale
1/sqrt(M (d+1)), so that a Gram matrix of `RandomFeatureAttention.features` tends to K / (d + 1),
with errors of order 1/sqrt(M). For tokens on the unit sphere, without a bias in W.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.methods.random_features.model import with_one
from foveate.ops.errors import InputError


def arc_cosine(rho: Tensor) -> Tensor:
    """kappa_1 of correlations in [-1, 1]."""
    rho = rho.clamp(-1.0, 1.0)
    return ((1 - rho.square()).sqrt() + rho * (math.pi - rho.arccos())) / (2 * math.pi)


def attention_kernel(
    query: Tensor, keys: Tensor, others: Tensor, their_keys: Tensor, numbers: int = 4_000_000
) -> Tensor:
    """K between two sets of examples.

    Args:
        query: (n, d), x_0 on the unit sphere.
        keys: (n, N, d).
        others: (n', d).
        their_keys: (n', N', d).
        numbers: products held at once.

    Returns:
        (n, n').

    Raises:
        InputError: shapes don't fit.
    """
    if query.shape[1:] != others.shape[1:] or keys.shape[2] != their_keys.shape[2]:
        raise InputError(
            f"attention_kernel: tokens are {keys.shape[2]} and {their_keys.shape[2]} wide; "
            "expected the same width."
        )
    first = with_one(query) @ with_one(others).T / 2
    mine, theirs = with_one(keys), with_one(their_keys).flatten(0, 1)
    step = max(1, numbers // (keys.shape[1] * len(theirs)))
    out = []
    for at in range(0, len(query), step):
        some = mine[at : at + step]
        products = (some.flatten(0, 1) @ theirs.T).view(*some.shape[:2], *their_keys.shape[:2])
        rho = first[at : at + step, None, :, None] * products / 2
        out.append((arc_cosine(rho) * products).mean((1, 3)))
    return torch.cat(out)
