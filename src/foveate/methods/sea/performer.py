"""The Performer that SEA's estimator begins with: linear attention over random features.

    C_t = sum_j phi(q_t) . phi(k_j) V_j / sum_j phi(q_t) . phi(k_j)

- causal: phi(x) = relu(W x) + 1e-3, sums over j <= t, in chunks: within a chunk as a small
  triangle, before it as one matrix. The sums go on from a state.
- bidirectional: FAVOR+'s softmax features, x' = x d^(-1/4),
  phi(x) = m^(-1/2) (exp(W x' - |x'|^2 / 2 - max) + 1e-4), the maximum over features for queries and
  over everything for keys, so that E phi(q) . phi(k) = exp(q . k / sqrt d), but for both constants.

W (m, d) are orthogonal Gaussian rows, m = int(d ln d / nbf). Choromanski et al. 2020, arXiv
2009.14794.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
_RELU_EPS, _EXP_EPS = 1e-3, 1e-4


class Sums(NamedTuple):
    """sum_j phi(k_j) V_j (B, H, m, W) and sum_j phi(k_j) (B, H, m)."""

    values: Tensor
    ones: Tensor


def feature_count(dim: int, divisor: float) -> int:
    """Random features, int(d ln d / nbf), at least 1."""
    return max(1, int(dim * math.log(dim) / divisor))


def draw(features: int, dim: int, random: torch.Generator | None = None) -> Tensor:
    """W (features, dim): orthogonal blocks, rows as long as Gaussian ones."""
    blocks = []
    for _ in range(-(-features // dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=random))
        blocks.append((q * r.diagonal().sign()).mT)  # with these signs all rotations are as likely
    lengths = torch.randn(features, dim, generator=random).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:features] * lengths


def relu_features(x: Tensor, w: Tensor) -> Tensor:
    """Of x (B, H, L, D): (B, H, L, m), above 0."""
    return torch.relu(x @ w.mT) + _RELU_EPS


def softmax_features(
    x: Tensor, w: Tensor, *, keys: bool, shift: bool = True, eps: float = _EXP_EPS
) -> Tensor:
    """FAVOR+ of x (B, H, L, D): (B, H, L, m).

    Args:
        x: queries or keys.
        w: (m, D).
        keys: whether the maximum is over tokens too.
        shift: whether the maximum is taken off.
        eps: added to each exponential.
    """
    x = x * x.shape[-1] ** -0.25
    logits = x @ w.mT - x.square().sum(-1, keepdim=True) / 2
    if shift:
        logits = logits - logits.detach().amax((-1, -2) if keys else -1, keepdim=True)
    return len(w) ** -0.5 * (logits.exp() + eps)


def causal(q: Tensor, k: Tensor, v: Tensor, before: Sums | None = None) -> tuple[Tensor, Sums]:
    """C (B, H, L, W) and the sums after the last token.

    Args:
        q: (B, H, L, m) features.
        k: (B, H, L, m) features, 0 on padding.
        v: (B, H, L, W).
        before: sums of earlier tokens.
    """
    length, chunk = q.shape[2], min(CHUNK, q.shape[2])
    q, k, v = (F.pad(x, (0, 0, 0, -length % chunk)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    made = Sums(k.mT @ v, k.sum(-2))
    upto = Sums(made.values.cumsum(2), made.ones.cumsum(2))
    # What is before a chunk must not know of it, not even by rounding.
    start = Sums(_later(upto.values, (0, 0, 0, 0)), _later(upto.ones, (0, 0)))
    last = Sums(upto.values[:, :, -1], upto.ones[:, :, -1])
    if before is not None:
        start = Sums(*(x + y[:, :, None] for x, y in zip(start, before)))
        last = Sums(*(x + y for x, y in zip(last, before)))
    weights = (q @ k.mT).tril()
    total = weights.sum(-1) + (q @ start.ones[..., None])[..., 0]
    out = weights @ v + q @ start.values
    out = out / total[..., None].masked_fill(total[..., None] == 0, 1.0)
    return out.flatten(2, 3)[:, :, :length], last


def _later(x: Tensor, keep: tuple[int, ...]) -> Tensor:
    """Put x (B, H, n, ...) one chunk later, 0 before the first."""
    return F.pad(x[:, :, :-1], (*keep, 1, 0))


def bidirectional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """C (B, H, L, W) of features q, k (B, H, L, m) and v (B, H, L, W)."""
    total = q @ k.sum(-2)[..., None]
    return (q @ (k.mT @ v)) / total
