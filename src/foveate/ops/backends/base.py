"""What a backend is given, what it gives back, and how it declares what it can do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.bias import spread_bias
from foveate.ops.layout import Layout
from foveate.ops.masks import Mask
from foveate.ops.types import AttentionOutput


@dataclass(frozen=True)
class Inputs:
    """One call of the core op, checked.

    query (B, Hq, Lq, D), key (B, Hkv, Lkv, D), value (B, Hkv, Lkv, Dv), bias 4-D: broadcastable to
    (B, Hq, Lq, Lkv), or with `bias_first` the table of a `RelativeBias`, (.., .., 1 or Lq, R). At
    most one of `mask` and `layout` is given; neither is everything.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None = None
    layout: Layout | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    dropout: float = 0.0
    needs_grad: bool = False
    bias_first: int | None = None

    def resolved(self, tile: int | tuple[int, int] = 64, *, gathers: bool = False) -> Inputs:
        """The same call with a layout in place of its mask.

        A backend that `gathers` reads rows by index, so that a mask may put them in its own order.
        """
        if self.mask is None:
            return self
        q_len, kv_len = self.query.shape[2], self.key.shape[2]
        rows, cols = tile if isinstance(tile, tuple) else (tile, tile)
        rows = min(rows, max(8, -(-q_len // 8) * 8))  # no empty rows for a few queries
        device = self.query.device
        layout = self.mask._ordered(q_len, kv_len, (rows, cols), device) if gathers else None
        if layout is None:
            layout = self.mask.layout(q_len, kv_len, (rows, cols), device=device)
        return replace(self, mask=None, layout=layout)

    def plain_bias(self) -> Tensor | None:
        """The bias, broadcastable to (B, Hq, Lq, Lkv): a relative one with all its pairs."""
        if self.bias is None or self.bias_first is None:
            return self.bias
        return spread_bias(self.bias, self.bias_first, self.query.shape[2], self.key.shape[2])

    def allowed(self) -> Tensor | None:
        """Which pairs attend, bool and broadcastable to (B, Hq, Lq, Lkv); None is all."""
        heads, q_len, kv_len = self.query.shape[1], self.query.shape[2], self.key.shape[2]
        if self.mask is not None:
            allowed = self.mask.dense(q_len, kv_len, device=self.query.device)
        elif self.layout is not None:
            allowed = self.layout.dense()
        else:
            return None
        if allowed.shape[1] not in (1, heads):
            allowed = allowed.repeat_interleave(heads // allowed.shape[1], dim=1)
        return allowed


class Gradients(NamedTuple):
    """Gradients of the inputs; bias is None where there was none."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


class Backend:
    """One implementation of the core op.

    `composite` backends are plain torch that autograd and the compiler look into; the others run
    behind a registered operator and bring their own backward.
    """

    name: str
    composite = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    device_types: tuple[str, ...] | None = None
    softcap = True
    bias = True
    relative_bias = True
    dropout = False
    backward = True
    value_dim_differs = True
    narrow_keys = False
    """Whether keys and values may have 8 bits beside wider queries."""

    def not_supported_reasons(self, inputs: Inputs) -> list[str]:
        """Why this backend can't run the call; an empty list if it can."""
        reasons = []
        query = inputs.query
        if query.dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            reasons.append(f"dtype {str(query.dtype).removeprefix('torch.')} (it takes {names})")
        if inputs.key.dtype != query.dtype and not self.narrow_keys:
            found = str(inputs.key.dtype).removeprefix("torch.")
            reasons.append(f"keys of {found} beside wider queries")
        if self.device_types is not None and query.device.type not in self.device_types:
            reasons.append(
                f"device {query.device.type} (it runs on {', '.join(self.device_types)})"
            )
        if inputs.softcap is not None and not self.softcap:
            reasons.append("softcap")
        if inputs.bias is not None and not self.bias:
            reasons.append("bias")
        elif inputs.bias_first is not None and not self.relative_bias:
            reasons.append("relative bias")
        if inputs.dropout and not self.dropout:
            reasons.append("dropout")
        if inputs.needs_grad and not self.backward:
            reasons.append("it has no backward, and an input requires a gradient")
        if inputs.value.shape[-1] != query.shape[-1] and not self.value_dim_differs:
            reasons.append(
                f"value head size {inputs.value.shape[-1]} differs from query head size "
                f"{query.shape[-1]}"
            )
        return reasons

    def forward(self, inputs: Inputs) -> AttentionOutput:
        """The output and its lse."""
        raise TypeError(f"backend {self.name!r} defines no forward")

    def backward_pass(
        self,
        inputs: Inputs,
        output: AttentionOutput,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
    ) -> Gradients:
        """Gradients of a loss whose gradients at `out` and `lse` are given (None is zero)."""
        raise TypeError(f"backend {self.name!r} defines no backward")


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the lse, and of sums: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)
