"""How far a change of rank can move attention: the guardrail, in the paper's form and a sound one.

    tail   ||X_r' - X_r||_F = sqrt(sum_(min < k <= max) sigma_k^2), exact (paper, equation 8, there
           said of A by its singular values, without a derivation); relative to ||X||_F
    sound  ||dS||_F <= (||dQ||_F ||K||_2 + ||Q||_2 ||dK||_F) / sqrt(d)
           ||dA||_F <= 1/2 ||dS||_F          (the softmax's Jacobian has norm 1/2 at most)
           ||dO||_F <= ||dA||_F ||V||_2      (the paper's equation 9 has ||dA||_2 ||V||_F)

Erden 2025, arXiv 2512.15973. An action is safe if its cost is at most eps_t = eps_0 decay^t; the
current rank costs 0, so some action always is.
"""

from __future__ import annotations

import torch
from torch import Tensor

GUARDS = ("tail", "sound", "none")


def tail(sigma: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """||X_two - X_one||_F: sigma (..., d), ranks one and two integers that broadcast to (...)."""
    below = torch.nn.functional.pad(sigma.square().cumsum(-1), (1, 0))
    most = sigma.shape[-1]
    low, high = torch.minimum(one, two).clamp(0, most), torch.maximum(one, two).clamp(0, most)
    shape = torch.broadcast_shapes(sigma.shape[:-1], low.shape, high.shape)
    below = below.expand(*shape, most + 1)
    ends = [below.gather(-1, x.expand(shape)[..., None])[..., 0] for x in (high, low)]
    return (ends[0] - ends[1]).clamp_min(0).sqrt()


def score_bound(
    change_q: Tensor, change_k: Tensor, norm_q: Tensor, norm_k: Tensor, width: int
) -> Tensor:
    """Of ||dS||_F: Frobenius norms of the changes, spectral norms of Q and K before or after.

    dS = dQ K^T + Q' dK^T with K before and Q' after the change; a truncation has no larger spectral
    norm than the whole, so the wholes' norms do for both.
    """
    return (change_q * norm_k + norm_q * change_k) * width**-0.5


def weight_bound(change: Tensor) -> Tensor:
    """Of ||dA||_F, from one of ||dS||_F."""
    return change / 2


def output_bound(change: Tensor, norm_v: Tensor) -> Tensor:
    """Of ||dO||_F, from one of ||dA||_F and ||V||_2."""
    return change * norm_v


@torch.no_grad()
def spectral_norm(
    x: Tensor,
    iterations: int = 3,
    *,
    safety: float = 1.0,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """||X||_2 of x (..., n, d) by power iteration on X^T X from a random unit vector.

    It never exceeds the true norm, so for a bound give a safety factor, or a tolerance: then it
    runs until a step changes it by less than that share (1,000 steps at most).

    Args:
        x: any.
        iterations: the paper's 3; ignored with a tolerance.
        safety: factor on the result.
        tolerance: of a step.
        generator: of the start.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    start = torch.randn(wide.shape[-1], generator=generator).to(wide)
    v = start.expand(*wide.shape[:-2], -1)[..., None]
    v = v / v.norm(dim=-2, keepdim=True)
    found = wide.new_zeros(wide.shape[:-2])
    for _ in range(iterations if tolerance is None else 1000):
        u = wide.mT @ (wide @ v)
        v = u / u.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
        now = (wide @ v).norm(dim=(-2, -1))
        done = tolerance is not None and bool(((now - found).abs() <= tolerance * now).all())
        found = now
        if done:
            break
    return found * safety


def tail_cost(sigmas: list[Tensor], current: Tensor, ranks: Tensor) -> Tensor:
    """Relative tails of a step to each rank, the worst of all heads and matrices: (B, R).

    Args:
        sigmas: (B, H, d) of each truncated matrix.
        current: (B,) ranks.
        ranks: (R,) of the actions.
    """
    worst = [
        tail(s[:, :, None], current[:, None, None], ranks[None, None])
        / s.square().sum(-1).sqrt().clamp_min(torch.finfo(s.dtype).tiny)[..., None]
        for s in sigmas
    ]
    return torch.stack([x.amax(1) for x in worst]).amax(0)


def sound_cost(
    sigma_q: Tensor,
    sigma_k: Tensor,
    current: Tensor,
    ranks: Tensor,
    rows: int,
    width: int,
    *,
    cut_q: bool,
) -> Tensor:
    """Bound of ||dA||_F / sqrt(rows), the worst of all heads: (B, R).

    A has rows that sum to 1, so this is at most about 1 and has no scale; times ||V||_2 it bounds
    the output's change.

    Args:
        sigma_q: (B, H, d); of all queries of a key head together, if heads are grouped.
        sigma_k: (B, H, d).
        current: (B,) ranks.
        ranks: (R,) of the actions.
        rows: queries.
        width: d, of the scores' scale.
        cut_q: whether queries are truncated as well.
    """
    at = (current[:, None, None], ranks[None, None])
    change_k = tail(sigma_k[:, :, None], *at)
    change_q = tail(sigma_q[:, :, None], *at) if cut_q else torch.zeros_like(change_k)
    change = score_bound(change_q, change_k, sigma_q[..., :1], sigma_k[..., :1], width)
    return (weight_bound(change) / max(1, rows) ** 0.5).amax(1)
