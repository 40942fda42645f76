"""Was the output right? Checked in the very run whose speed is reported.

A pattern's output is recomputed in float64 from the q, k and v that this text gave, with foveate's
reference and the same layout element by element, for some layers, heads and rows; the layout must
also stay within the mask that the model asked for. A method that claims to be exact must besides
give dense's logits. What fails has no speed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.compare.measure import Sample
from foveate.ops import Layout
from foveate.ops.reference import reference_attention

HEADS = 3
ROWS = 192
SCORES = 1 << 27
# Largest error of an output, as a share of the largest output.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# Largest difference of a logit from dense's, as a share of the largest logit, if exact.
LOGITS = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def layers_to_check(count: int) -> frozenset[int]:
    """The first, the middle and the last of a model's layers."""
    return frozenset({0, count // 2, count - 1})


def group_of(layout: Layout, batch: int, head: int) -> Layout:
    """One (batch entry, head group) of a layout, as a layout of its own."""
    b, h = min(batch, layout.ptr.shape[0] - 1), min(head, layout.ptr.shape[1] - 1)
    ptr = layout.ptr[b : b + 1, h : h + 1]
    first, last = int(ptr[0, 0, 0]), int(ptr[0, 0, -1])

    def own(table: Tensor | None) -> Tensor | None:
        if table is None:
            return None
        i, j = min(b, table.shape[0] - 1), min(h, table.shape[1] - 1)
        return table[i : i + 1, j : j + 1]

    return replace(
        layout,
        ptr=ptr - first,
        cols=layout.cols[first:last],
        kinds=layout.kinds[first:last],
        q_index=own(layout.q_index),
        kv_index=own(layout.kv_index),
        key_range=own(layout.key_range),
        row_range=own(layout.row_range),
        _counts=[],
    )


@torch.inference_mode()
def worst_error(samples: list[Sample], method: Any) -> tuple[float, list[str]]:
    """The largest relative error over the samples, and what is wrong besides (nothing, mostly)."""
    worst, problems = 0.0, []
    for sample in samples:
        if sample.layout is None:
            worst = max(worst, _recomputed(sample, sample.method or method))
            continue
        heads = sample.q.shape[1]
        for head in sorted({0, heads // 2, heads - 1} if heads > HEADS else range(heads)):
            batch = head % sample.q.shape[0]
            error, outside = _one(sample, sample.layout, batch, head)
            worst = max(worst, error)
            if outside:
                problems.append(
                    f"layer {sample.layer}, head {head}: {outside} pairs that the mask forbids"
                )
    return worst, problems


def _one(sample: Sample, layout: Layout, batch: int, head: int) -> tuple[float, int]:
    ctx, q_len, kv_len = sample.ctx, sample.q.shape[2], sample.k.shape[2]
    groups = layout.ptr.shape[1]
    own = group_of(layout, batch, head * groups // sample.q.shape[1])
    rows = torch.linspace(0, q_len - 1, min(ROWS, q_len), device=sample.q.device).long()
    allowed = own.dense()[0, 0][rows]
    outside = 0
    if ctx.mask is not None:
        seen = ctx.mask.dense(
            q_len, kv_len, q_positions=ctx.q_positions, kv_positions=ctx.kv_positions
        ).to(rows.device)
        seen = seen[min(batch, seen.shape[0] - 1), min(head, seen.shape[1] - 1)]
        outside = int((allowed & ~seen[rows]).sum())
    kv = head * sample.k.shape[1] // sample.q.shape[1]
    q = sample.q[batch, head][rows][None, None].double()
    k, v = (x[batch, kv][None, None].double() for x in (sample.k, sample.v))
    bias = None
    if ctx.bias is not None:
        full = ctx.bias.expand(sample.q.shape[0], sample.q.shape[1], q_len, kv_len)
        bias = full[batch, head][rows][None, None]
    scale = sample.q.shape[3] ** -0.5 if ctx.scale is None else ctx.scale
    want, lse = reference_attention(q, k, v, allowed, scale=scale, softcap=ctx.softcap, bias=bias)
    if ctx.sink_logits is not None:
        want = want * torch.sigmoid(lse - ctx.sink_logits[head].double())[..., None]
    return _relative(sample.out[batch, head][rows], want[0, 0]), outside


def _recomputed(sample: Sample, method: Any) -> float:
    """For a method without a layout: itself, in float64 on the reference backend.

    Where that would hold too many scores, on `blocks`, which is plain torch as well.
    """
    scores = sample.q[..., 0].numel() * sample.k.shape[2]
    backend = "reference" if scores <= SCORES else "blocks"
    ctx = replace(sample.ctx, backend=backend, store={})
    wide = method(sample.q.double(), sample.k.double(), sample.v.double(), ctx)
    return _relative(sample.out, wide.out)


def _relative(got: Tensor, want: Tensor) -> float:
    error = float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")


def verdict(
    method: Any, dtype: torch.dtype, error: float, problems: list[str], quality: dict[str, float]
) -> tuple[bool, str]:
    """Whether the speed of this run counts, and in a sentence why or why not."""
    limit = TOLERANCE[dtype]
    if problems:
        return False, "its layout leaves the model's mask: " + problems[0]
    if not error <= limit:
        return False, f"its output is off by {error:.1e} of the largest (limit {limit:.0e})"
    said = f"output within {error:.1e} of float64 (limit {limit:.0e})"
    if getattr(type(method), "exact", False) and "max_difference" in quality:
        most = LOGITS[dtype] * max(1.0, quality["max_logit"])
        off = quality["max_difference"]
        if not off <= most:
            return False, f"it claims to be exact, but a logit is off by {off:.1e} from dense"
        said += f"; logits within {off:.1e} of dense"
    return True, said
