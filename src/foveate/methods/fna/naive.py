"""Neighborhood attention query by query: gather each window's keys and values, then multiply.

What fused and unfused forms are measured against: no two queries share what was read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.methods.fna.windows import check, windows
from foveate.ops import AttentionOutput, neighborhood
from foveate.ops.errors import InputError

_BUDGET = 1 << 22  # gathered numbers at a time


def naive(
    q: Tensor, k: Tensor, v: Tensor, mask: neighborhood, scale: float | None = None
) -> AttentionOutput:
    """Attention over the windows of a grid, tokens row by row.

    Args:
        q: (B, H, N, D).
        k: (B, H, N, D), as many heads as q.
        v: (B, H, N, Dv).
        mask: over the N tokens.
        scale: factor on the scores; None is D ** -0.5.

    Returns:
        out (B, H, N, Dv), lse (B, H, N).

    Raises:
        InputError: batches, lengths, heads or dtypes don't fit.
    """
    check("naive", q, k, v, mask)
    if q.shape[1] != k.shape[1]:
        raise InputError(
            f"naive: expected as many heads of keys as of queries, got {k.shape[1]} and "
            f"{q.shape[1]}; repeat those of k and v, or use another form."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    own = windows(mask, (1,) * len(mask.axes))
    tokens = own.queries[:, 0]
    keys = own.box.gather(1, own.inside[:, 0].long())
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    size = math.prod(q.shape[:2]) * keys.shape[1] * max(q.shape[3], v.shape[3])
    for rows in torch.arange(len(tokens)).split(max(1, _BUDGET // max(1, size))):
        near = keys[rows]
        scores = torch.einsum("bhnd,bhnld->bhnl", q[:, :, tokens[rows]] * scale, k[:, :, near])
        if own.valid is not None:
            scores = scores.masked_fill(~own.valid[rows, 0], -torch.inf)
        part = scores.to(lse.dtype)
        lse[:, :, tokens[rows]] = part.logsumexp(-1)
        weights = part.softmax(-1).to(v.dtype)
        out[:, :, tokens[rows]] = torch.einsum("bhnl,bhnld->bhnd", weights, v[:, :, near])
    return AttentionOutput(out, lse)
