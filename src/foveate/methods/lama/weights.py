"""What attentions that pool share: weights over real tokens, sums, and how alike the heads are."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.errors import InputError


def checked(pooler: str, x: Tensor, real: Tensor | None, dim: int) -> None:
    """Refuse tokens of another width, and a `real` that doesn't say which of them are real."""
    if x.dim() != 3 or x.shape[2] != dim:
        raise InputError(f"{pooler}: expected tokens (B, L, {dim}), got {tuple(x.shape)}.")
    if real is not None and (real.dtype != torch.bool or real.shape != x.shape[:2]):
        raise InputError(
            f"{pooler}: expected real {tuple(x.shape[:2])} of bool, True for real tokens, got "
            f"{tuple(real.shape)} of {real.dtype}."
        )


def clean(x: Tensor, real: Tensor | None) -> Tensor:
    """X (B, L, d) with 0 on padding, which may hold anything."""
    return x if real is None else x.masked_fill(~real[..., None], 0)


def over_tokens(scores: Tensor, real: Tensor | None) -> Tensor:
    """Softmax of scores (B, m, L) over the real tokens; a row without any has zeros."""
    if real is None:
        return scores.softmax(-1)
    hidden = ~real[:, None]
    empty = hidden.all(-1, keepdim=True)
    scores = scores.masked_fill(hidden, -torch.inf).masked_fill(empty, 0.0)
    return scores.softmax(-1).masked_fill(hidden, 0.0)


def redundancy(weights: Tensor) -> Tensor:
    """||A A^T - I||_F^2, mean over the batch; weights A (B, m, L), the result a scalar.

    Large where heads look at the same tokens, 0 where each looks at one token of its own. Lin et
    al. 2017, arXiv 1703.03130, section 2.2.
    """
    alike = weights @ weights.mT - torch.eye(weights.shape[1], device=weights.device)
    return alike.square().sum((1, 2)).mean()


def losses(weights: Tensor, penalty: float) -> dict[str, Tensor]:
    """The weighted penalty as a loss, where it is asked for."""
    return {"redundancy_loss": penalty * redundancy(weights)} if penalty else {}
