"""Full attention: every key that the mask allows. What the others are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from foveate.ops import Layout
from foveate.parts.attention import Pattern, mask_layout
from foveate.parts.context import Context


@dataclass(frozen=True)
class Full(Pattern):
    """softmax(q k^T / sqrt(D)) v over all that `ctx.mask` allows; exact for any mask.

    Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1. Shapes as in `foveate.attention`.
    """

    exact: ClassVar[bool] = True

    @override
    def is_dense(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        return True

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        return mask_layout(ctx.mask, q, k, ctx)
