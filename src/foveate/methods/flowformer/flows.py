"""The flows of Flow-Attention, normal and causal, and what is read out with them.

Sources (keys and their values) send to sinks (queries) through capacities phi(q).phi(k). With
fq = phi(q), fk = phi(k) >= 0 and a small eps, in the normal form of n sinks and m sources

    1.  I_i = (fq_i + eps).(sum_j fk_j + eps)               incoming flow of sink i
        O_j = (fk_j + eps).(sum_i fq_i + eps)               outgoing flow of source j
    2.  Ihat_i = (fq_i + eps).(sum_j fk_j / O_j + eps)      with every source's outgoing flow at 1
        Ohat_j = (fk_j + eps).(sum_i fq_i / I_i + eps)      with every sink's incoming flow at 1
    3.  c_j = m softmax_j(Ohat)                             competition of the sources
        a_i = sigmoid(Ihat_i n / m)                         allocation to the sinks
    4.  out_i = a_i (fq_i / I_i) . sum_j fk_j^T (c_j v_j)

and in the causal form the same with every sum over the tokens s <= t alone, N_t = t of them:

    2.  Ihat_t = (fq_t + eps).(sum_s fk_s N_s / O_s + eps) / N_t, and Ohat_t likewise
    3.  c_t = N_t exp(Ohat_t) / sum_s exp(Ohat_s),  a_t = sigmoid(Ihat_t)

Wu et al. 2022, arXiv 2202.06258, equations 3 to 8; the factors m, n/m and N are those of its code.
Work is linear in n and m; what is held is O((n + m)(d + d_v)), and one (d, d_v) matrix for each
chunk. Shapes: B batch, K key/value heads, G query heads to each, D and Dv head sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Sums = dict[str, Tensor]
"""What the causal form keeps of the tokens so far: see `causal`."""

_NOTHING = -1e30  # log of a sum of nothing; finite, so that its gradient is 0 and not NaN


class Flows(NamedTuple):
    """The flows of one call, by query head (query heads of a group lie beside each other).

    Attributes:
        incoming: I, (B, Hq, n).
        outgoing: O, (B, Hq, m).
        conserved_in: Ihat, (B, Hq, n).
        conserved_out: Ohat, (B, Hq, m), clamped where it is asked for.
        competition: c, (B, Hq, m); 0 on padding.
        allocation: a, (B, Hq, n).
    """

    incoming: Tensor
    outgoing: Tensor
    conserved_in: Tensor
    conserved_out: Tensor
    competition: Tensor
    allocation: Tensor


class Options(NamedTuple):
    """What may differ: eps, the limit of |Ohat| (None is none), and the two ablations."""

    eps: float
    clamp: float | None
    competition: bool
    allocation: bool


def normal(
    fq: Tensor, fk: Tensor, q_real: Tensor, k_real: Tensor, options: Options
) -> tuple[Flows, Tensor]:
    """Steps 1 to 3 where every sink sees every source.

    Args:
        fq: (B, K, G, n, D), 0 on padding.
        fk: (B, K, m, D), 0 on padding.
        q_real: (1 or B, n) bool.
        k_real: (1 or B, m) bool.
        options: as they say.

    Returns:
        The flows, and c once more as (B, K, G, m).
    """
    eps = options.eps
    q_real, k_real = q_real[:, None, None], k_real[:, None, None]
    sinks, sources = (x.sum(-1, keepdim=True).to(fq.dtype) for x in (q_real, k_real))
    fk = fk[:, :, None]
    incoming = _dot(fq + eps, fk.sum(-2, keepdim=True) + eps)
    outgoing = _dot(fk + eps, fq.sum(-2, keepdim=True) + eps)
    incoming, outgoing = (  # on padding anything but 0 does
        torch.where(real, x, 1) for real, x in ((q_real, incoming), (k_real, outgoing))
    )
    conserved_in = _dot(fq + eps, _weighted(fk, outgoing.reciprocal()) + eps)
    conserved_out = _dot(fk + eps, _weighted(fq, incoming.reciprocal()) + eps)
    if options.clamp is not None:
        conserved_out = conserved_out.clamp(-options.clamp, options.clamp)
    if options.competition:
        competition = conserved_out.masked_fill(~k_real, _NOTHING).softmax(-1) * sources
    else:
        competition = k_real.to(fq.dtype).expand_as(conserved_out)
    allocation = (
        (conserved_in * sinks / sources.clamp(min=1)).sigmoid()
        if options.allocation
        else torch.ones_like(conserved_in)
    )
    flows = (incoming, outgoing, conserved_in, conserved_out, competition, allocation)
    return Flows(*(x.flatten(1, 2) for x in flows)), competition


def causal(
    fq: Tensor, fk: Tensor, real: Tensor, options: Options, sums: Sums
) -> tuple[Flows, Tensor, Sums]:
    """Steps 1 to 3 where every sink sees the sources up to its own place.

    Args:
        fq: (B, K, G, n, D) of the new tokens, 0 on padding.
        fk: (B, K, n, D), likewise.
        real: (1 or B, n) bool.
        options: as they say.
        sums: over all tokens before; empty at the beginning. By name: count N (B, 1), fk and q
            (sum of fq), k_over_o (sum of fk N / O) and q_over_i, all (B, K, G or 1, 1, D); log_z
            (B, K, G, 1).

    Returns:
        The flows, c as (B, K, G, n), and the sums with the new tokens.
    """
    eps, held = options.eps, dict(sums)

    def total(name: str, x: Tensor, dim: int = -2) -> Tensor:
        found = x.cumsum(dim)
        if name in sums:
            found = found + sums[name]
        held[name] = found.narrow(dim, -1, 1).clone()  # a view would hold all of them
        return found

    count = total("count", real.to(fq.dtype).expand(len(fq), -1), -1)
    n = count.clamp(min=1)[:, None, None]  # in front of the first real token all else is 0
    real = real[:, None, None]
    fk = fk[:, :, None]
    incoming = torch.where(real, _dot(fq + eps, total("k", fk) + eps), 1)
    outgoing = torch.where(real, _dot(fk + eps, total("q", fq) + eps), 1)
    k_over_o = total("k_over_o", fk * (n / outgoing)[..., None])
    q_over_i = total("q_over_i", fq * (n / incoming)[..., None])
    conserved_in = _dot(fq + eps, k_over_o + eps) / n
    conserved_out = _dot(fk + eps, q_over_i + eps) / n
    if options.clamp is not None:
        conserved_out = conserved_out.clamp(-options.clamp, options.clamp)
    if options.competition:
        # The running maximum is within logcumsumexp: nothing overflows, with a clamp or without.
        logits = conserved_out.masked_fill(~real, _NOTHING)
        if "log_z" in sums:
            log_z = torch.cat((sums["log_z"], logits), -1).logcumsumexp(-1)[..., 1:]
        else:
            log_z = logits.logcumsumexp(-1)
        held["log_z"] = log_z[..., -1:].clone()
        competition = torch.where(real, n * (logits - log_z).exp(), 0)
    else:
        competition = real.to(fq.dtype).expand_as(conserved_out)
    allocation = conserved_in.sigmoid() if options.allocation else torch.ones_like(conserved_in)
    flows = (incoming, outgoing, conserved_in, conserved_out, competition, allocation)
    return Flows(*(x.flatten(1, 2) for x in flows)), competition, held


def read_all(fq: Tensor, fk: Tensor, values: Tensor) -> Tensor:
    """fq_i . sum_j fk_j^T values_j, the (D, Dv) matrix first.

    Args:
        fq: (B, K, G, n, D).
        fk: (B, K, m, D).
        values: (B, K, G, m, Dv).
    """
    return fq @ _outer(fk, values)


def read_before(
    fq: Tensor, fk: Tensor, values: Tensor, chunk: int, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """fq_t . sum_{s <= t} fk_s^T values_s, chunk by chunk: (n / chunk) matrices, never n.

    Within a chunk it is the quadratic form, for all chunks at once; what came before is one matrix.

    Args:
        fq: (B, K, G, n, D).
        fk: (B, K, n, D).
        values: (B, K, G, n, Dv).
        chunk: tokens that are taken together.
        before: (B, K, G, D, Dv), the sum over all earlier tokens; None is 0.

    Returns:
        (B, K, G, n, Dv), and the sum over all tokens, the new ones included.
    """
    n = fq.shape[-2]
    size = min(chunk, n)
    q, k, v = (_chunks(x, size) for x in (fq, fk, values))
    k = k[:, :, None]
    sums = _outer_each(k, v)
    totals = sums.cumsum(3)
    if before is not None:
        totals = totals + before[:, :, :, None]
    first = torch.zeros_like(totals[:, :, :, 0]) if before is None else before
    ahead = torch.cat((first[:, :, :, None], totals[:, :, :, :-1]), 3)
    out = (q @ k.mT).tril() @ v + q @ ahead
    return out.flatten(3, 4)[..., :n, :], totals[:, :, :, -1].clone()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1) if y.shape[-2] > 1 else (x @ y.mT)[..., 0]


def _weighted(x: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights_j x_j: x (..., j, D), weights (..., j) -> (..., 1, D)."""
    return weights[..., None, :] @ x


def _outer(fk: Tensor, values: Tensor) -> Tensor:
    """sum_j fk_j^T values_j for all query heads of a group in one product: (B, K, G, D, Dv)."""
    groups = values.shape[2]
    beside = values.transpose(2, 3).flatten(3)  # (B, K, m, G Dv)
    return (fk.mT @ beside).unflatten(-1, (groups, -1)).transpose(2, 3)


def _outer_each(k: Tensor, v: Tensor) -> Tensor:
    """The same for each chunk: k (B, K, 1, N, C, D), v (B, K, G, N, C, Dv)."""
    return k.mT @ v


def _chunks(x: Tensor, size: int) -> Tensor:
    """(..., n, D) -> (..., N, size, D), the last one filled up with zeros."""
    missing = -x.shape[-2] % size
    if missing:
        x = torch.cat((x, x.new_zeros(*x.shape[:-2], missing, x.shape[-1])), -2)
    return x.unflatten(-2, (-1, size))
