"""torch's own fused attention: the best dense attention that torch brings.

Calls the flash operators behind `scaled_dot_product_attention`, since only those return the lse;
what is particular to GPUs is in `sdpa_gpu`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from foveate.ops.backends import sdpa_gpu
from foveate.ops.backends.base import Backend, Gradients, Inputs
from foveate.ops.masks import causal
from foveate.ops.types import AttentionOutput

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Sdpa(Backend):
    """Dense and causal attention by torch's flash kernels; on a CPU, other masks as a tensor."""

    name = "sdpa"
    device_types = ("cpu", "cuda")
    softcap = False
    bias = False
    value_dim_differs = False

    @override
    def not_supported_reasons(self, inputs: Inputs) -> list[str]:
        reasons = super().not_supported_reasons(inputs)
        if 0 in inputs.query.shape or 0 in inputs.key.shape:
            reasons.append("an axis of size 0")
        if inputs.query.device.type == "cuda":
            reasons += sdpa_gpu.reasons(inputs.query, is_plain(inputs))
        return reasons

    @override
    def forward(self, inputs: Inputs) -> AttentionOutput:
        query, key, value = _per_head(inputs)
        is_causal, extra = _causality(inputs)
        if query.device.type == "cuda":
            out, lse = sdpa_gpu.forward(query, key, value, is_causal, inputs.scale)
            return AttentionOutput(out, lse)
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
        on_gpu = query.device.type == "cuda"
        wider = 8 if on_gpu else 1  # head sizes on a GPU are multiples of 8
        if extra is not None:
            # A row that sees nothing has no gradient; a finite lse keeps the kernel's exp at zero.
            lse = lse.masked_fill(lse == -torch.inf, 0.0)
        if grad_lse is not None:
            # dS = P * (dO V' - rowsum(dO * O) + dlse). One more value column, with dO = 1,
            # O = -dlse and V = 0, puts exactly -dlse into the row sum.
            query, key, value = (pad(x, (0, wider)) for x in (query, key, value))
            do = pad(do, (0, wider))
            do[..., -1] = 1.0
            out = pad(out, (0, wider))
            out[..., -1] = -grad_lse.to(out.dtype)
        if on_gpu:
            dq, dk, dv = sdpa_gpu.backward(do, query, key, value, out, lse, is_causal, inputs.scale)
        else:
            dq, dk, dv = _backward(
                do, query, key, value, out, lse, 0.0, is_causal, attn_mask=extra, scale=inputs.scale
            )
        if grad_lse is not None:
            dq, dk, dv = (x[..., :-wider] for x in (dq, dk, dv))
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
    # torch's CPU kernel scales what it has hidden already: -inf times a scale of 0 would be NaN.
    if is_plain(inputs) and (inputs.scale != 0 or inputs.query.device.type == "cuda"):
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


def passed_over(inputs: Inputs, triton_can: bool) -> list[str]:
    """Why `auto` doesn't take sdpa for a call that it could run; empty if it does.

    triton_can: whether the Triton engine runs the call.
    """
    if not is_plain(inputs):
        return [
            "would hold the whole mask and skip nothing; auto takes it for dense and causal only"
        ]
    if triton_can and not sdpa_gpu.declared_faster(inputs.query, inputs.key):
        name = sdpa_gpu.implementation(inputs.query.device)
        return [
            f"{name} isn't declared faster than triton for this head size and length; "
            "activate FA3 or FA4 with torch.nn.attention.activate_flash_attention_impl"
        ]
    return []
