"""Rows of scores to rows of weights, other than by softmax; what `foveate.ops.weighted` takes.

Each function gets scores s (..., keys), 0 where a key isn't visible, and `visible` (..., keys)
bool; what it says of keys that aren't visible doesn't count. Sums run over the visible ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _top(s: Tensor, visible: Tensor) -> Tensor:
    """The row's largest visible score (..., 1), 0 where nothing is visible."""
    top = s.detach().masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
    return top.masked_fill(top == -torch.inf, 0.0)


def _count(visible: Tensor, like: Tensor) -> Tensor:
    """T, the keys that a row sees (..., 1), at least 1."""
    return visible.sum(-1, keepdim=True).clamp_min(1).to(like.dtype)


def softmax(s: Tensor, visible: Tensor) -> Tensor:
    """e^s / sum e^s."""
    e = torch.exp(s - _top(s, visible)).masked_fill(~visible, 0.0)
    return e / e.sum(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)


def clipped(s: Tensor, visible: Tensor, zeta: float, gamma: float, alpha: float | None) -> Tensor:
    """clip((zeta - gamma) softmax(s) + gamma, 0, 1); with alpha, gamma = -alpha / T."""
    p = softmax(s, visible)
    low: float | Tensor = gamma if alpha is None else -alpha / _count(visible, s)
    return ((zeta - low) * p + low).clamp(0.0, 1.0)


def softpick(s: Tensor, visible: Tensor, eps: float) -> Tensor:
    """relu(e^s - 1) / (sum |e^s - 1| + eps), both times e^-m with m = max s (at least 0)."""
    m = _top(s, visible).clamp_min(0.0)
    shifted = torch.exp(s - m) - torch.exp(-m)
    total = shifted.abs().masked_fill(~visible, 0.0).sum(-1, keepdim=True)
    return functional.relu(shifted) / (total + eps * torch.exp(-m))


def sigmoid(s: Tensor, visible: Tensor, bias: float | None) -> Tensor:
    """sigma(s + c); c is `bias`, or -log T."""
    c: float | Tensor = -_count(visible, s).log() if bias is None else bias
    return torch.sigmoid(s + c)


def elu(s: Tensor, visible: Tensor) -> Tensor:
    """Elu(s) + 1."""
    return functional.elu(s) + 1.0


def normalised(w: Tensor, visible: Tensor, eps: float = 1e-8) -> Tensor:
    """Weights that are at least 0 over their sum."""
    return w / (w.masked_fill(~visible, 0.0).sum(-1, keepdim=True) + eps)


def sparsemax(s: Tensor, visible: Tensor) -> Tensor:
    """The point of the simplex nearest to s: relu(s - tau), tau such that the row sums to 1."""
    z = s - _top(s, visible)
    order = z.masked_fill(~visible, -torch.inf).sort(-1, descending=True).values
    at = torch.arange(1, s.shape[-1] + 1, device=s.device, dtype=s.dtype)
    finite = order.masked_fill(order == -torch.inf, -2.0)  # below every tau: none can count
    cumulative = finite.cumsum(-1)
    held = (1 + at * finite > cumulative) & (order > -torch.inf)
    size = held.sum(-1, keepdim=True).clamp_min(1)
    tau = (cumulative.gather(-1, size - 1) - 1) / size
    return functional.relu(z - tau)


def entmax15(s: Tensor, visible: Tensor) -> Tensor:
    """Entmax with alpha = 1.5: relu(s / 2 - tau)^2, tau such that the row sums to 1.

    Peters et al. 2019, arXiv 1905.05702, algorithm 2.
    """
    z = (s - _top(s, visible)) / 2
    order = z.masked_fill(~visible, -torch.inf).sort(-1, descending=True).values
    finite = order.masked_fill(order == -torch.inf, -2.0)
    at = torch.arange(1, s.shape[-1] + 1, device=s.device, dtype=s.dtype)
    mean = finite.cumsum(-1) / at
    spread = at * (finite.square().cumsum(-1) / at - mean.square())
    delta = (1 - spread) / at
    # The root's slope at 0 is infinite; there the key isn't in the support, and it counts as 0.
    some = delta > 0
    tau = mean - delta.where(some, 1.0).sqrt().where(some, 0.0)
    size = ((tau <= finite) & (order > -torch.inf)).sum(-1, keepdim=True).clamp_min(1)
    return functional.relu(z - tau.gather(-1, size - 1)).square()
