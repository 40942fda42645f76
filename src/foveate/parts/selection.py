"""Choosing the best under a mask: in fp32 or wider, the same choice every time.

Of equal scores the one with the lower index wins, on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.errors import InputError


def topk_mask(scores: Tensor, k: int, allowed: Tensor | None = None) -> Tensor:
    """The k best of each row: bool (..., N).

    Args:
        scores: (..., N) floats; +inf is always among the best, NaN is below every number.
        k: how many; where fewer are allowed, all of those.
        allowed: bool, broadcastable to scores; None is all.
    """
    if k < 0:
        raise InputError(f"topk_mask(k={k}): expected at least 0.")
    ranks = _ranks(scores, allowed)
    open_ = ranks > -torch.inf
    if k == 0:
        return torch.zeros_like(open_)
    if k >= scores.shape[-1]:
        return open_
    last = ranks.kthvalue(scores.shape[-1] - k + 1, -1, keepdim=True).values
    above = ranks > last
    ties = ranks == last
    spare = k - above.sum(-1, keepdim=True)
    return (above | (ties & (ties.cumsum(-1) <= spare))) & open_


def threshold_mask(
    scores: Tensor, threshold: float | Tensor, allowed: Tensor | None = None, least: int = 1
) -> Tensor:
    """Scores of at least `threshold`, and in any case the `least` best: bool (..., N).

    Args:
        scores: (..., N) floats; NaN is below every number.
        threshold: a number, or one per row, broadcastable to scores.
        allowed: bool, broadcastable to scores; None is all.
        least: how many to keep in each row whatever their scores, as far as they are allowed.
    """
    ranks = _ranks(scores, allowed)
    return ((ranks >= threshold) & (ranks > -torch.inf)) | topk_mask(scores, least, allowed)


def _ranks(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Scores in fp32 or wider; -inf is kept for what isn't allowed."""
    ranks = scores.to(torch.promote_types(scores.dtype, torch.float32))
    lowest = torch.finfo(ranks.dtype).min
    ranks = torch.where(ranks >= lowest, ranks, lowest)
    return ranks if allowed is None else ranks.masked_fill(~allowed, -torch.inf)
