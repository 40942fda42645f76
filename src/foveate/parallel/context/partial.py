"""One call of the core op among several that together make an attention, forward and backward.

Forward: results over disjoint sets of keys are merged by their lse, in fp32. Backward: with the
lse and out of the *whole* row, the parts' gradients are those of the whole and simply add up:

    p = exp(s - lse),  delta = rowsum(dO * out) - dlse,  dV += p^T dO,
    ds = p * (dO V^T - delta) * scale,  dQ += ds K,  dK += ds^T Q
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops import AttentionOutput, attention, library, merge
from foveate.ops.backends.base import lse_dtype
from foveate.parallel.context.rule import Part


@dataclass(frozen=True)
class How:
    """What all parts of one attention share.

    Attributes:
        scale: factor on the scores.
        softcap: c in c * tanh(score / c); None is none.
        backend: the core op's.
    """

    scale: float
    softcap: float | None = None
    backend: str = "auto"


def attend(q: Tensor, k: Tensor, v: Tensor, part: Part, how: How) -> AttentionOutput:
    """One part's out and lse, out in the dtype of the lse."""
    found = attention(
        q, k, v, layout=part.on(q.device), scale=how.scale, softcap=how.softcap, backend=how.backend
    )
    return AttentionOutput(found.out.to(found.lse.dtype), found.lse)


def nothing(q: Tensor, value_dim: int) -> AttentionOutput:
    """The result over no keys: out 0 and lse -inf, in the dtype of sums."""
    wide = lse_dtype(q.dtype)
    out = torch.zeros(*q.shape[:3], value_dim, dtype=wide, device=q.device)
    return AttentionOutput(out, torch.full_like(out[..., 0], -torch.inf))


def add(
    sofar: AttentionOutput | None, q: Tensor, k: Tensor, v: Tensor, part: Part, how: How
) -> AttentionOutput | None:
    """`sofar` and one part, merged; None stands for no keys yet."""
    if part.empty:
        return sofar
    found = attend(q, k, v, part, how)
    return found if sofar is None else merge([sofar, found])


def finished(sofar: AttentionOutput | None, q: Tensor, value_dim: int) -> AttentionOutput:
    """The whole attention's result, out in the dtype of the query."""
    done = nothing(q, value_dim) if sofar is None else sofar
    return AttentionOutput(done.out.to(q.dtype), done.lse)


class Whole(NamedTuple):
    """What the backward of every part needs of the whole rows.

    q (B, Hq, Lq, D), out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) of all keys together; gradients at
    both, None is zero.
    """

    q: Tensor
    out: Tensor
    lse: Tensor
    dout: Tensor | None
    dlse: Tensor | None


class Three(NamedTuple):
    """Gradients of queries, keys and values, in the dtype of sums."""

    q: Tensor
    k: Tensor
    v: Tensor


def gradients(whole: Whole, k: Tensor, v: Tensor, part: Part, how: How) -> Three | None:
    """One part's share of the gradients; None where it has none."""
    if part.empty:
        return None
    packed = library.pack(None, part.on(k.device))
    wide = lse_dtype(whole.q.dtype)
    dq, dk, dv, _ = torch.ops.foveate.attention_backward(
        whole.dout, whole.dlse, whole.out, whole.lse, whole.q, k, v, None, *packed,
        how.scale, how.softcap, None, how.backend,
    )  # fmt: skip
    return Three(dq.to(wide), dk.to(wide), dv.to(wide))


def zeros(x: Tensor) -> Tensor:
    """Where sums begin: zeros like x, in the dtype of sums."""
    return torch.zeros(x.shape, dtype=lse_dtype(x.dtype), device=x.device)
