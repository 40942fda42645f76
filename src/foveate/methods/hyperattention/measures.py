"""alpha and kappa: how well attention suits the estimator (HyperAttention, section 2).

    alpha = n max_j || P e_j ||_2^2        P = D^-1 A, n queries; 1 <= alpha <= n^2 (no mask)
    kappa = max_i light_i / min_i light_i  light_i = <1 - M_H[i], A[i]>, what no block holds

The number of samples that is needed grows with alpha; one column that everyone attends to (a sink)
makes alpha about n^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops import Mask, probs

_ROWS = 256


def alpha(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    skip: int = 0,
) -> Tensor:
    """Alpha of each head, (B, Hq); no Lq x Lkv matrix is held.

    Args:
        query: (B, Hq, Lq, D).
        key: (B, Hkv, Lkv, D).
        lse: (B, Hq, Lq) of exact attention.
        mask: of that call.
        scale: of that call; None is D ** -0.5.
        skip: first columns that are left out, as sinks that are computed exactly are.
    """
    columns = lse.new_zeros(*lse.shape[:2], key.shape[2])
    for rows in torch.arange(query.shape[2], device=query.device).split(_ROWS):
        columns += probs(query, key, lse, rows, mask, scale=scale).square().sum(2)
    return query.shape[2] * columns[..., skip:].amax(-1)


def kappa(lse: Tensor, heavy_lse: Tensor) -> Tensor:
    """Kappa of each head, (B, Hq), from the lse of exact attention and of its heavy part.

    Args:
        lse: (B, Hq, Lq).
        heavy_lse: (B, Hq, Lq), of the keys in M_H alone; inf where it holds all the mass.
    """
    light = lse.double() + torch.log1p(-torch.exp((heavy_lse - lse).double()).clamp_max(1.0))
    return torch.exp(light.amax(-1) - light.amin(-1))
