"""What a head's attention matrix looks like: entropy, concentration, diversity, sink, local focus.

Of causal weights A (B, H, L, L), for each sequence, in nats where there are logarithms:

    entropy        mean_i sum_j -A_ij log A_ij
    concentration  ||A||_F
    diversity      2 / (L (1 + L)) sum_{j<=i} std over heads of A_ij
    sink           mean_i A_i1
    local focus    mean_i A_i,i-N,   N = 0, 1, 2, 3

Source: arXiv 2510.11602, section 6. They look at whole matrices: they are for lengths that one can
look at, not for training.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.parts.attention import Attention
from foveate.parts.context import Context

LOCAL = (0, 1, 2, 3)


class Indicators(NamedTuple):
    """Each (B, H), but diversity (B,) and local (B, H, 4)."""

    entropy: Tensor
    concentration: Tensor
    diversity: Tensor
    sink: Tensor
    local: Tensor


def matrix_of(attention: Attention, q: Tensor, k: Tensor, ctx: Context) -> Tensor:
    """The weights A (B, Hq, L, L) of any attention that is linear in its values: those of ones.

    Args:
        attention: such as those of `foveate.methods`.
        q: (B, Hq, L, D).
        k: (B, Hkv, L, D).
        ctx: of the call.
    """
    eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    return attention(q, k, eye.expand(*k.shape[:2], -1, -1), ctx).out


def indicators(weights: Tensor) -> Indicators:
    """The indicators of causal attention weights (B, H, L, L), rows summing to 1.

    Raises:
        InputError: another shape, or weights above the diagonal.
    """
    if weights.dim() != 4 or weights.shape[2] != weights.shape[3]:
        raise InputError(f"indicators: expected (B, H, L, L), got {tuple(weights.shape)}.")
    if weights.triu(1).any():
        raise InputError("indicators: expected causal weights, but some see later tokens.")
    a = weights.to(torch.promote_types(weights.dtype, torch.float32))
    length = a.shape[2]
    spread = a.std(1, correction=0).tril().sum((-1, -2))
    # The mean is over the rows that have such a neighbour.
    local = [
        a.diagonal(-n, -2, -1).mean(-1) if n < length else a.new_zeros(a.shape[:2]) for n in LOCAL
    ]
    return Indicators(
        entropy=-torch.special.xlogy(a, a).sum(-1).mean(-1),
        concentration=a.square().sum((-1, -2)).sqrt(),
        diversity=spread * 2 / (length * (1 + length)),
        sink=a[..., 0].mean(-1),
        local=torch.stack(local, -1),
    )
