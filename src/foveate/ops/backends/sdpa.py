"""torch's own fused attention on the CPU: the best dense attention that torch brings.

Calls the flash operator behind `scaled_dot_product_attention`, since only that returns the lse.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from foveate.ops.backends.base import Backend, Gradients, Inputs
from foveate.ops.masks import causal
from foveate.ops.types import AttentionOutput

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Sdpa(Backend):
    """Dense and causal attention by torch's CPU flash kernel; other masks as a dense tensor."""

    name = "sdpa"
    device_types = ("cpu",)
    softcap = False
    bias = False
    value_dim_differs = False

    @override
    def not_supported_reasons(self, inputs: Inputs) -> list[str]:
        reasons = super().not_supported_reasons(inputs)
        if 0 in inputs.query.shape or 0 in inputs.key.shape:
            reasons.append("an axis of size 0")
        return reasons

    @override
    def forward(self, inputs: Inputs) -> AttentionOutput:
        query, key, value = _per_head(inputs)
        is_causal, extra = _causality(inputs)
        out, lse = _forward(query, key, value, 0.0, is_causal, attn_mask=extra, scale=inputs.scale)
        if extra is not None:
            empty = (extra == -torch.inf).all(-1).expand(lse.shape)
            out = out.masked_fill(empty[..., None], 0.0)
            lse = lse.masked_fill(empty, -torch.inf)
        return AttentionOutput(out, lse)

    @override
    def backward_pass(
        self,
        inputs: Inputs,
        output: AttentionOutput,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
    ) -> Gradients:
        query, key, value = _per_head(inputs)
        is_causal, extra = _causality(inputs)
        out, lse = output.out, output.lse
        do = torch.zeros_like(out) if grad_out is None else grad_out.to(out.dtype)
        if extra is not None:
            # A row that sees nothing has no gradient; a finite lse keeps the kernel's exp at zero.
            lse = lse.masked_fill(lse == -torch.inf, 0.0)
        if grad_lse is not None:
            # dS = P * (dO V' - rowsum(dO * O) + dlse). One more value column, with dO = 1,
            # O = -dlse and V = 0, puts exactly -dlse into the row sum.
            query, key, value = (pad(x, (0, 1)) for x in (query, key, value))
            do = torch.cat((do, torch.ones_like(do[..., :1])), -1)
            out = torch.cat((out, -grad_lse[..., None].to(out.dtype)), -1)
        dq, dk, dv = _backward(
            do, query, key, value, out, lse, 0.0, is_causal, attn_mask=extra, scale=inputs.scale
        )
        if grad_lse is not None:
            dq, dk, dv = dq[..., :-1], dk[..., :-1], dv[..., :-1]
        kv_shape = (inputs.key.shape[0], inputs.key.shape[1], -1, *inputs.key.shape[2:])
        return Gradients(dq, dk.reshape(kv_shape).sum(2), dv.reshape(kv_shape).sum(2), None)


def _per_head(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value with keys and values repeated to one per query head."""
    group = inputs.query.shape[1] // inputs.key.shape[1]
    if group == 1:
        return inputs.query, inputs.key, inputs.value
    return (
        inputs.query,
        inputs.key.repeat_interleave(group, 1),
        inputs.value.repeat_interleave(group, 1),
    )


def _causality(inputs: Inputs) -> tuple[bool, Tensor | None]:
    """(plain causal?, mask as an additive tensor or None)."""
    if inputs.mask is None and inputs.layout is None:
        return False, None
    if is_plain(inputs):
        return True, None
    allowed = inputs.allowed()
    assert allowed is not None
    extra = torch.zeros(allowed.shape, dtype=inputs.query.dtype, device=allowed.device)
    return False, extra.masked_fill(~allowed, -torch.inf)


def is_plain(inputs: Inputs) -> bool:
    """Whether the call is dense, or causal with as many queries as keys."""
    if inputs.layout is not None:
        return False
    square = inputs.query.shape[2] == inputs.key.shape[2]
    return inputs.mask is None or (inputs.mask == causal() and square)
