"""Put parts together: by their lse where key sets are disjoint, by weights where they overlap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.types import AttentionOutput


def merge(
    parts: Sequence[AttentionOutput], rows: Sequence[Tensor | None] | None = None
) -> AttentionOutput:
    """Attention over the union of disjoint key sets, from its parts.

        lse = log sum_p exp(lse_p),   out = sum_p exp(lse_p - lse) out_p

    Exact and differentiable (through the lse too), in any order, also a few parts at a time. A part
    that saw no key (lse -inf) changes nothing.

    Args:
        parts: results for the same queries, each out (B, H, Lq, Dv) and lse (B, H, Lq).
        rows: for each part None, or (n,) indices of the queries that it covers, each once; its
            length axis is then n. The first part must cover all.
    """
    if not parts:
        raise InputError("merge needs at least one part.")
    if rows is not None and len(rows) != len(parts):
        raise InputError(f"merge got {len(parts)} parts but {len(rows)} row sets.")
    full = [
        _placed(part, None if rows is None else rows[i], parts[0], first=i == 0)
        for i, part in enumerate(parts)
    ]
    outs, lses = [p.out for p in full], torch.stack([p.lse for p in full])
    top = lses.detach().amax(0)
    base = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(lses - base)
    total = weights.sum(0)
    empty = total == 0
    share = weights / total.masked_fill(empty, 1.0)
    merged = sum(w[..., None] * o.to(w.dtype) for w, o in zip(share, outs))
    assert isinstance(merged, Tensor)
    lse = (base + total.masked_fill(empty, 1.0).log()).masked_fill(empty, -torch.inf)
    return AttentionOutput(merged.to(outs[0].dtype), lse)


def _placed(
    part: AttentionOutput, rows: Tensor | None, first_part: AttentionOutput, *, first: bool
) -> AttentionOutput:
    want = first_part.lse.shape
    if rows is None:
        if part.lse.shape != want or part.out.shape[:-1] != part.lse.shape:
            raise InputError(
                f"merge: a part has lse {tuple(part.lse.shape)} and out {tuple(part.out.shape)}, "
                f"but the first has lse {tuple(want)}; parts must be for the same queries."
            )
        return part
    if first or part.lse.shape[2] != rows.numel():
        raise InputError(
            "merge: the first part must cover all rows, and a part with rows must have one entry "
            f"for each of its {rows.numel()} rows, got {part.lse.shape[2]}."
        )
    out = part.out.new_zeros(*want, part.out.shape[-1]).index_copy(2, rows, part.out)
    lse = part.lse.new_full(want, -torch.inf).index_copy(2, rows, part.lse)
    return AttentionOutput(out, lse)


def mix(weights: Sequence[Tensor] | Tensor, outs: Sequence[Tensor]) -> Tensor:
    """Plain weighted sum of outputs, for parts whose key sets overlap.

    Args:
        weights: one tensor for each output, broadcastable to it without its last axis or with it;
            or one tensor with the outputs along its first axis.
        outs: tensors of one shape, (B, H, Lq, Dv).
    """
    if len(weights) != len(outs) or not outs:
        raise InputError(f"mix got {len(weights)} weights for {len(outs)} outputs.")
    total = None
    for weight, out in zip(weights, outs):
        if out.shape != outs[0].shape:
            raise InputError(
                f"mix: outputs differ in shape, {tuple(out.shape)} and {tuple(outs[0].shape)}."
            )
        w = weight[..., None] if weight.dim() == out.dim() - 1 else weight
        total = w * out if total is None else total + w * out
    assert total is not None
    return total
