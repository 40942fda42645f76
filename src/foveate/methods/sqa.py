"""Sparse query attention: fewer query heads of the same width.

    q_i = x W_Q,i (i < Hq),  k_g, v_g = x W_K,g, x W_V,g (g < Hkv),  y = concat_i(o_i) W_O

The width of a head is d = dim / H of the model with all H heads, so that Hq < H heads cut the
FLOPs of scores and values by H / Hq; W_O is narrower accordingly. Filipek 2025, arXiv 2510.01817,
section 3. The cache keeps 2 Hkv d numbers for each token.

Variants, as Hq / Hkv of H heads (and a grouped-query baseline of H / 4):

    sqa   H/2 / H/4     ssqa  H/2 / H/2     xsqa  H/4 / H/4     xsmqa  H/4 / 1     lsqa  3H/4 / H/4
    rsqa  H/4 / H/2: more key/value than query heads; queries are repeated, outputs are Hkv wide

SW-SQA is any of them with `attention="sink-window(sinks=0, window=...)"`; Flex-SQA has learned
global tokens beside the window, `global_tokens`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.gqa import GroupedProjection
from foveate.ops import attention as core_attention
from foveate.ops import merge
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention
from foveate.parts.context import Context
from foveate.parts.projection import (
    QKV,
    Recipe,
    Selection,
    Sizes,
    columns_of,
    rows_of,
    share,
    split_heads,
)

# Hq / H and Hkv / H; 0 is one head.
VARIANTS = {
    "sqa": (Fraction(1, 2), Fraction(1, 4)),
    "ssqa": (Fraction(1, 2), Fraction(1, 2)),
    "xsqa": (Fraction(1, 4), Fraction(1, 4)),
    "xsmqa": (Fraction(1, 4), Fraction(0)),
    "lsqa": (Fraction(3, 4), Fraction(1, 4)),
    "rsqa": (Fraction(1, 4), Fraction(1, 2)),
}


@dataclass(frozen=True)
class SQA(Recipe):
    """Hq < H query heads of the width dim / H; 2 Hkv d numbers cached per token.

    Attributes:
        variant: sqa, ssqa (symmetric), xsqa (extreme), xsmqa, lsqa (light), rsqa (reverse).
        query_heads: Hq in place of the variant's.
        kv_heads: Hkv in place of the variant's; above Hq it is the reverse form.
        global_tokens: learned tokens that every query sees beside its window (Flex-SQA).

    Raises:
        InputError: an unknown variant, or heads that don't fit the model's.
    """

    variant: str = "sqa"
    query_heads: int | None = None
    kv_heads: int | None = None
    global_tokens: int = 0

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise InputError(
                f"SQA(variant={self.variant!r}) is unknown; {nearest(str(self.variant), VARIANTS)}"
            )
        for name in ("query_heads", "kv_heads"):
            if getattr(self, name) is not None:
                whole("SQA", name, getattr(self, name), least=1)
        whole("SQA", "global_tokens", self.global_tokens, least=0)

    def counts(self, num_heads: int) -> tuple[int, int]:
        """(Hq, Hkv) for a model of H heads.

        Raises:
            InputError: the variant's share of H is no whole number, or Hq is more than H.
        """
        found = []
        given = self.query_heads, self.kv_heads
        for name, count, part in zip(("query", "key/value"), given, VARIANTS[self.variant]):
            wanted = part * num_heads
            if count is None and wanted.denominator != 1:
                raise InputError(
                    f"SQA(variant={self.variant!r}): {part} of {num_heads} heads is no whole "
                    f"number of {name} heads; give query_heads and kv_heads."
                )
            found.append(max(1, int(wanted)) if count is None else count)
        if found[0] > num_heads:
            raise InputError(
                f"SQA(query_heads={found[0]}): the model has {num_heads} heads; expected at most "
                "as many."
            )
        return found[0], found[1]

    @override
    def build(self, sizes: Sizes) -> SQAProjection:
        heads, kv_heads = self.counts(sizes.num_heads)
        return SQAProjection(sizes, heads, kv_heads, self.global_tokens)


class SQAProjection(GroupedProjection):
    """Steps 1 to 8: GQA with Hq query heads of width d = dim / H, Hq d being less than dim.

    In the reverse form (Hq < Hkv) each query head is repeated Hkv / Hq times, contiguously.
    """

    def __init__(self, sizes: Sizes, heads: int, kv_heads: int, global_tokens: int) -> None:
        super().__init__(sizes, max(heads, kv_heads), kv_heads, sizes.width)
        if self.heads % heads:
            raise InputError(
                f"{heads} query heads can't be repeated for {kv_heads} key/value heads; expected "
                "a divisor."
            )
        self.repeats = self.heads // heads
        if self.repeats > 1:
            self.q = nn.Linear(sizes.dim, heads * self.head_dim, sizes.bias)
        self.globals: nn.Parameter | None = None
        if global_tokens:
            self.globals = nn.Parameter(torch.zeros(global_tokens, sizes.source))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Global tokens start small and different."""
        if self.globals is not None:
            nn.init.normal_(self.globals, std=0.02)

    @override
    def query(self, x: Tensor) -> Tensor:
        q = split_heads(self.q(x), self.heads // self.repeats)
        return q if self.repeats == 1 else q.repeat_interleave(self.repeats, 1)

    @property
    @override
    def attends_once(self) -> bool:
        return self.globals is None

    @override
    def attend(
        self, attention: Attention, qkv: QKV, ctx: Context, selection: Selection | None
    ) -> Tensor:
        if self.globals is None:
            return super().attend(attention, qkv, ctx, selection)
        made = self.entries(self.globals.expand(len(qkv.q), -1, -1))
        everywhere = core_attention(
            qkv.q, made["k"], made["v"], scale=ctx.scale, softcap=ctx.softcap, dropout=ctx.dropout,
            backend=ctx.backend,
        )  # fmt: skip
        return merge([attention(*qkv, ctx), everywhere]).out

    @override
    def shard(self, rank: int, ranks: int) -> Self:
        if self.repeats == 1:
            return super().shard(rank, ranks)
        width = self.head_dim
        mine = share(self.heads // self.repeats, rank, ranks, "query heads")
        wide = slice(mine.start * self.repeats, mine.stop * self.repeats)
        part = deepcopy(self)
        part.heads = part.kv_heads = wide.stop - wide.start
        part.q = rows_of(self.q, mine, width)
        part.k, part.v = rows_of(self.k, wide, width), rows_of(self.v, wide, width)
        part.out = columns_of(self.out, wide, width, first=rank == 0)
        return part
