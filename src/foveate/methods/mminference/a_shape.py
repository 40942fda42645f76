"""A-shape and tri-shape: a wide sink and a local band, MInference's static head patterns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.mminference.lines import layout_of_parts
from foveate.methods.mminference.prefill import ProblemPattern
from foveate.methods.mminference.problem import Part, Problem, problems
from foveate.ops import Layout, Mask, causal, sinks, window
from foveate.ops.masks.checks import whole
from foveate.parts.attention import TILE, mask_layout
from foveate.parts.context import Context


@dataclass(frozen=True)
class AShape(ProblemPattern):
    """Query i sees key j if j <= i and (j < sinks or i - j < local), within `ctx.mask`.

    The causal half comes from `ctx.mask`; under a mask that lets tokens see later ones the band
    reaches as far to the right. Decoding is dense. arXiv 2407.02490, section 3; MMInference's
    search space has sinks 128 with local 1024, 2048 or 4096.

    Attributes:
        sinks: tokens at the start that all see.
        local: width of the band, the query's own token included.

    Raises:
        InputError: a field that is no integer, sinks below 0 or local below 1.
    """

    sinks: int = 128
    local: int = 1024

    def __post_init__(self) -> None:
        whole("AShape", "sinks", self.sinks, least=0)
        whole("AShape", "local", self.local, least=1)

    @override
    def _keeps_all(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        # With more queries than keys, the first ones stand before them and look to the right.
        reach = max(q.shape[2], k.shape[2])
        return self.local >= reach and ctx.q_positions is None and ctx.kv_positions is None

    @override
    def rule(self, ctx: Context) -> Mask:
        shape = _band(self.sinks, self.local)
        return shape if ctx.mask is None else ctx.mask & shape

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        return mask_layout(self.rule(ctx), q, k, ctx)

    @override
    def parts(self, problem: Problem) -> list[list[Part]]:
        rows, keys = (torch.arange(len(x), device=x.device) for x in (problem.rows, problem.keys))
        return [[Part(rows, keys, band=_band(self.sinks, self.local))]] * problem.heads


def _band(first: int, local: int) -> Mask:
    return sinks(first) | window(local - 1, local - 1)


@dataclass(frozen=True)
class TriShape(ProblemPattern):
    """An A-shape whose last `bottom` queries see everything; a baseline of both papers.

    The queries at the end of a prompt ask about all of it. Within `ctx.mask`, which must be causal.
    Decoding is dense. arXiv 2504.16083, section 4.

    Attributes:
        sinks: tokens at the start that all see.
        local: width of the band, the query's own token included.
        bottom: last queries, which see all.

    Raises:
        InputError: a field that doesn't fit, or a mask that isn't causal.
    """

    sinks: int = 128
    local: int = 4096
    bottom: int = 128

    def __post_init__(self) -> None:
        whole("TriShape", "sinks", self.sinks, least=0)
        whole("TriShape", "local", self.local, least=1)
        whole("TriShape", "bottom", self.bottom, least=0)

    @override
    def _keeps_all(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        plain = ctx.q_positions is None and ctx.kv_positions is None
        return max(q.shape[2], k.shape[2]) <= self.local and plain and ctx.mask == causal()

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        made = [[(p, self.parts(p))] for p in problems(q, k, ctx, 1, "tri-shape")]
        return layout_of_parts(made, (q.shape[2], k.shape[2]), TILE, q.device)

    @override
    def parts(self, problem: Problem) -> list[list[Part]]:
        rows, keys = (torch.arange(len(x), device=x.device) for x in (problem.rows, problem.keys))
        above = max(0, len(rows) - self.bottom)
        both = [
            Part(rows[:above], keys, band=_band(self.sinks, self.local)), Part(rows[above:], keys)
        ]  # fmt: skip
        return [both] * problem.heads
