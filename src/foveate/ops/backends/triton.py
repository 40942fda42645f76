"""The Triton engine as a backend: dense attention and any layout on GPUs, forward and backward."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from typing_extensions import override

from foveate.ops import triton
from foveate.ops.backends.base import Backend, Gradients, Inputs
from foveate.ops.masks import causal
from foveate.ops.types import AttentionOutput

_TILE = (128, 128)  # one or two steps of most configurations


class Triton(Backend):
    """Kernels of `foveate.ops.triton`; there where Triton is installed and torch sees a GPU."""

    name = "triton"
    dtypes = triton.DTYPES
    narrow_keys = True

    @override
    def not_supported_reasons(self, inputs: Inputs) -> list[str]:
        reasons = super().not_supported_reasons(inputs)
        own = triton.supports(
            inputs.query, inputs.key, inputs.value, inputs.bias, inputs.needs_grad
        )
        return reasons + [r for r in own if r not in reasons]

    @override
    def forward(self, inputs: Inputs) -> AttentionOutput:
        call = _resolved(inputs)
        out, lse = triton.forward(
            call.query,
            call.key,
            call.value,
            call.layout,
            call.scale,
            call.softcap,
            call.bias,
            call.bias_first,
        )
        return AttentionOutput(out, lse)

    @override
    def backward_pass(
        self,
        inputs: Inputs,
        output: AttentionOutput,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
    ) -> Gradients:
        call = _resolved(inputs)
        found = triton.backward(
            grad_out,
            grad_lse,
            call.query,
            call.key,
            call.value,
            output.out,
            output.lse,
            call.layout,
            call.scale,
            call.softcap,
            call.bias,
            call.bias_first,
        )
        return Gradients(*found)


def _resolved(inputs: Inputs) -> Inputs:
    """Masks as layouts."""
    if inputs.query.shape[2] == 1 and inputs.mask == causal():
        return replace(inputs, mask=None)  # the last query sees every key: no layout for each step
    return inputs.resolved(_TILE)
