"""The importance of a key, from the values of all key/value heads.

    delta[g, j] = exp(A_g softplus((W_dt Vcat_j)_g))       "exp": v1 of the paper, transformers
    delta[g, j] = A_g softplus((W_dt Vcat_j)_g)            "log": later kernels and models

The two rise with each other, so both keep the same keys; they add different numbers to the logits,
and weights trained with one don't serve the other. The exponential overflows where A softplus is
large.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from foveate.ops.errors import InputError

Form = Literal["exp", "log"]
FORMS: tuple[Form, ...] = ("exp", "log")


class Scored(NamedTuple):
    """bias: delta, added to the logits; rank: its log form, which orders the keys; (B, G, L)."""

    bias: Tensor
    rank: Tensor


class Importance(nn.Module):
    """W_dt and A of one layer, named as in transformers' DogeAttention.

    Args:
        heads: G key/value heads.
        value_dim: width of their values.
        form: "exp" or "log".
        bias: whether W_dt has one.
    """

    def __init__(
        self, heads: int, value_dim: int, form: Form = "exp", *, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.value_dim, self.form = heads, value_dim, form
        self.A = nn.Parameter(torch.zeros(heads))
        self.dt_proj = nn.Linear(heads * value_dim, heads, bias)

    def reset_parameters(self) -> None:
        """A is 0, so that all keys are alike: the layer starts as a sliding window."""
        nn.init.zeros_(self.A)
        self.dt_proj.reset_parameters()

    def forward(self, v: Tensor) -> Scored:
        """Score the keys of v (B, G, L, Dv); in fp32, or v's dtype if that is wider.

        Raises:
            InputError: other heads than it was made for.
        """
        if v.shape[1] != self.heads or v.shape[3] != self.value_dim:
            raise InputError(
                f"dma: the layer was built for {self.heads} key/value heads of width "
                f"{self.value_dim}, got values {tuple(v.shape)}."
            )
        work = torch.promote_types(v.dtype, torch.float32)
        wide = softplus(self.dt_proj(v.transpose(1, 2).flatten(2)).to(work))
        log = (self.A.to(work) * wide).transpose(1, 2)
        return Scored(self.bias_of(log), log)

    def bias_of(self, rank: Tensor) -> Tensor:
        """Delta from its log form."""
        return rank.exp() if self.form == "exp" else rank
