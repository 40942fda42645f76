"""Redistribution of the mass on sinks (ACT): what later sinks hold goes to all other keys.

    S = {j >= first: mean_i A_ij > a / T},   T keys
    A'_ij = beta A_ij                        for j in S
    A'_ij = A_ij (n_i + (1 - beta) m_i) / n_i   otherwise,   m_i = sum_S A_ij, n_i = 1 - m_i

so that rows still sum to 1. The mean is over the queries that see key j, of this call. Without a
row's weights being held: with o the output of all keys and o_S that of the keys in S alone,

    o'_i = beta m_i o_S + (n_i + (1 - beta) m_i) (o - m_i o_S) / n_i,   m_i = exp(lse_S - lse).

Yu et al. 2024, arXiv 2406.15765, which chooses the heads by trial; an Assignment (or `by-head`)
says which heads of a model run it. Section 3.2 of Su et al. 2026, arXiv 2604.10098.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.ops import AttentionOutput, Mask, attention, blocks, column_sums, with_sinks
from foveate.ops.bias import spread_bias
from foveate.ops.check import check_bias
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import EVERYTHING, Attention, clock, mask_layout
from foveate.parts.context import Context, Work
from foveate.parts.tokens import queries_that_are, tokens_of

_ROWS = 256


@dataclass(frozen=True)
class Redistribution(Attention):
    """Full attention, its sinks beyond the first tokens turned down to `beta` of their mass.

    Attributes:
        a: a key is a sink if it gets more than a / T of a query's mass on average.
        beta: the share of its mass that a sink keeps.
        first: tokens at the start that are left alone (1, the sink that models rely on).

    Raises:
        InputError: a isn't above 0, beta outside 0 to 1, or first below 0.
    """

    a: float = 5.0
    beta: float = 0.4
    first: int = 1

    def __post_init__(self) -> None:
        whole("Redistribution", "first", self.first, least=0)
        if not 0 < self.a < float("inf"):
            raise InputError(f"Redistribution(a={self.a!r}): expected a number above 0.")
        if not 0 <= self.beta <= 1:
            raise InputError(f"Redistribution(beta={self.beta!r}): expected 0 to 1.")

    def sinks(self, q: Tensor, k: Tensor, lse: Tensor, ctx: Context) -> Tensor:
        """S as (B, Hq, Lkv) bool, from this call's queries; those of padding don't count."""
        mask, where = by_index(q, k, ctx)
        real = queries_that_are(tokens_of(q, k, ctx)).to(q.device).expand(len(q), -1)[:, None]
        options = {"scale": ctx.scale, "softcap": ctx.softcap, "bias": ctx.bias}
        sums = column_sums(q, k, lse.masked_fill(~real, -torch.inf), mask, **options)
        seen = sum(
            (rows_of(mask, q, k, rows) & real[..., rows, None]).sum(2)
            for rows in torch.arange(q.shape[2], device=q.device).split(_ROWS)
        )
        assert isinstance(seen, Tensor)
        keys = (seen > 0).sum(-1, keepdim=True).clamp_min(1)
        return (sums / seen.clamp_min(1) > self.a / keys) & (where >= self.first)[:, None]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Attend; shapes as in `Attention`. The choice of S isn't differentiated.

        Raises:
            InputError: dropout, which would redraw the weights between the two passes.
        """
        ctx = Context() if ctx is None else ctx
        if ctx.dropout:
            raise InputError(
                "Redistribution doesn't take dropout: it moves whole rows of mass; leave it out."
            )
        start = clock(q, ctx)
        mask, _ = by_index(q, k, ctx)
        options = ctx.options | {"sink_logits": None}
        dense = attention(q, k, v, mask, **options)
        out, lse = dense
        if ctx.sink_logits is not None:  # a factor on whole rows, which moving mass leaves alone
            lse = with_sinks(dense, ctx.sink_logits).lse
        with torch.no_grad():
            chosen = self.sinks(q, k, lse, ctx)
            some = chosen.any(1).any(0).nonzero()[:, 0]
        if some.numel():
            out = self._moved(q, k, v, dense, chosen, some, mask, options)
        if ctx.sink_logits is not None:
            out = with_sinks(AttentionOutput(out, dense.lse), ctx.sink_logits).out
        if ctx.stats is not None and not torch.compiler.is_compiling():
            layout = mask_layout(ctx.mask, q, k, ctx)
            ctx.stats(
                layer=ctx.layer, layout=Work(2 * layout.pairs, 2 * layout.tile_area),
                build_seconds=0.0, attend_seconds=clock(q, ctx) - start,
            )  # fmt: skip
        return AttentionOutput(out, lse)

    def _moved(
        self, q: Tensor, k: Tensor, v: Tensor, dense: AttentionOutput, chosen: Tensor,
        some: Tensor, mask: Mask, options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """The output with the chosen keys' mass moved; `some` are keys that any head chose."""
        parts = torch.arange(q.shape[2], device=q.device).split(_ROWS)
        allowed = torch.cat([rows_of(mask, q, k, rows)[..., some] for rows in parts], 2)
        allowed = (allowed & chosen[:, :, None, some]).expand(*q.shape[:3], -1)
        if options["bias"] is not None:  # by distance or not, of the chosen keys where they stand
            bias, first = check_bias(options["bias"], q, k)
            if first is not None:
                bias = spread_bias(bias, first, q.shape[2], k.shape[2], keys=some)
            elif bias.shape[-1] > 1:
                bias = bias[..., some]
            options = options | {"bias": bias}
        part = attention(q, k[:, :, some], v[:, :, some], blocks(allowed, 1), **options)
        work = part.lse.dtype
        blind = (part.lse == -torch.inf) | (dense.lse == -torch.inf)
        apart = part.lse.masked_fill(blind, 0.0) - dense.lse.masked_fill(blind, 0.0)
        share = apart.exp().masked_fill(blind, 0.0).clamp_max(1.0)
        rest = 1.0 - share
        # A row that sees nothing but sinks has nowhere to put their mass: it stays as it is.
        only = rest <= 8 * torch.finfo(work).eps
        grown = (1.0 - self.beta * share) / rest.masked_fill(only, 1.0)
        ours, theirs = dense.out.to(work), share[..., None] * part.out.to(work)
        moved = self.beta * theirs + grown[..., None] * (ours - theirs)
        return moved.where(~only[..., None], ours).to(v.dtype)


def by_index(q: Tensor, k: Tensor, ctx: Context) -> tuple[Mask, Tensor]:
    """The mask of a call by index, positions worked in; and each key's position, (1 or B, Lkv)."""
    index = torch.arange(k.shape[2], device=q.device)[None]
    mask = EVERYTHING if ctx.mask is None else ctx.mask
    if ctx.q_positions is None and ctx.kv_positions is None:
        return mask, index
    where = index if ctx.kv_positions is None else ctx.kv_positions.reshape(-1, k.shape[2])
    return blocks(mask_layout(mask, q, k, ctx).dense(), 1), where


def rows_of(mask: Mask, q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """The mask's rows for some queries: (1 or B, 1 or Hq, n, Lkv) bool."""
    at = rows + (k.shape[2] - q.shape[2])
    allowed = mask.dense(len(rows), k.shape[2], q_positions=at, device=q.device)
    if allowed.shape[1] not in (1, q.shape[1]):
        allowed = allowed.repeat_interleave(q.shape[1] // allowed.shape[1], 1)
    return allowed
