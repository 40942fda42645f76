"""LUCID: any attention, over values from which what similar earlier keys hold is erased first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.methods.lucid.solve import normalised, solve
from foveate.methods.lucid.triangle import triangle
from foveate.methods.naming import make
from foveate.ops import AttentionOutput
from foveate.ops.check import check_tensors
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention
from foveate.parts.context import Context


@dataclass(frozen=True)
class Lucid(Attention):
    inner: str | Attention = "full"
    block: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        whole("Lucid", "block", self.block, least=1)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Shapes as in `Attention`; the lse is the inner attention's."""
        ctx = Context() if ctx is None else ctx
        check_tensors(q, k, v)
        inner = make(self.inner) if isinstance(self.inner, str) else self.inner
        return inner(q, k, self.prepared(k, v, ctx), ctx)

    def prepared(self, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        kbar = normalised(k, self.eps)
        wide = v.to(kbar.dtype)
        y = solve(kbar, wide, wide[:, :, :0], triangle(k, 0, self.block, ctx))
        return y.to(v.dtype)
