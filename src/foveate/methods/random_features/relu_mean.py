"""Attention by ReLU and a mean: no softmax, no normaliser but the number of keys.

    out_i = (1 / N_i) sum_j ReLU(scale q_i^T k_j) v_j,   N_i = keys that query i may see

The score type of arXiv 2307.11353 (equation of the model, with 1/N for all of a layer's keys); N_i
makes it one for any mask. Rows aren't distributions: an output may be 0, or grow with the scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from foveate.ops import AttentionOutput
from foveate.ops.check import check_tensors
from foveate.ops.errors import InputError
from foveate.parts.attention import EVERYTHING, Attention
from foveate.parts.context import Context
from foveate.parts.precision import uncast

ROWS = 256


@dataclass(frozen=True)
class ReluMean(Attention):
    """ReLU of the scores and a mean; no lse (NaN). Operations are those of dense attention.

    It goes over blocks of queries, and of keys only up to the last one that a block may see; a
    block's scores are kept for the backward.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Shapes as in `Attention`; computed in fp32 or wider.

        Raises:
            InputError: shapes don't fit, or the model asks for what goes into a softmax only: a
                bias, a cap or sinks.
        """
        ctx = Context() if ctx is None else ctx
        check_tensors(q, k, v)
        for name in ("bias", "softcap", "sink_logits"):
            if getattr(ctx, name) is not None:
                raise InputError(
                    f"relu-mean has no softmax for the model's {name} to go into; use another "
                    "attention, such as 'full'."
                )
        work = torch.promote_types(q.dtype, torch.float32)
        group = q.shape[1] // k.shape[1]
        scale = q.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale
        queries = q.to(work).unflatten(1, (k.shape[1], group)) * scale
        keys, values = k.to(work)[:, :, None], v.to(work)[:, :, None]
        with uncast(q):
            out = self._mixed(queries, keys, values, q.shape[2], group, ctx)
        lse = torch.full(q.shape[:3], math.nan, dtype=work, device=q.device)
        return AttentionOutput(out.to(v.dtype), lse)

    @staticmethod
    def _mixed(
        queries: Tensor, keys: Tensor, values: Tensor, q_len: int, group: int, ctx: Context
    ) -> Tensor:
        """Block by block of queries (B, Hkv, group, Lq, D); keys and values have a group of 1."""
        parts, kv_len = [], keys.shape[3]
        for rows in torch.arange(q_len, device=queries.device).split(ROWS):
            seen = _seen(rows, q_len, kv_len, ctx, queries.device)
            some = seen.any(2).any(0).any(0).nonzero()[:, 0]
            end = int(some[-1]) + 1 if len(some) else 0
            hits = (queries[:, :, :, rows] @ keys[..., :end, :].mT).relu().flatten(1, 2)
            hits = hits.masked_fill(~seen[..., :end], 0)
            if ctx.dropout:
                hits = functional.dropout(hits, ctx.dropout)
            count = seen.sum(-1, keepdim=True).clamp_min(1)
            mixed = hits.unflatten(1, (-1, group)) @ values[..., :end, :]
            parts.append(mixed.flatten(1, 2) / count)
        if not parts:
            return queries.flatten(1, 2).new_zeros(
                len(queries), queries.shape[1] * group, 0, values.shape[-1]
            )
        return torch.cat(parts, 2)


def _seen(rows: Tensor, q_len: int, kv_len: int, ctx: Context, device: torch.device) -> Tensor:
    """Which keys some of the queries may see: bool (1 or B, 1 or Hq, n, Lkv)."""
    mask = EVERYTHING if ctx.mask is None else ctx.mask
    at = rows + (kv_len - q_len) if ctx.q_positions is None else ctx.q_positions[..., rows]
    return mask.dense(
        len(rows), kv_len, q_positions=at, kv_positions=ctx.kv_positions, device=device
    )
