"""The C++ engine as a backend: dense attention and any layout on the CPU, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops import cpu
from foveate.ops.backends.base import Backend, Gradients, Inputs
from foveate.ops.masks import causal
from foveate.ops.types import AttentionOutput


class Cpu(Backend):
    """Kernels of `foveate.ops.cpu`; there when the package was installed with a compiler."""

    name = "cpu"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    device_types = ("cpu",)

    @override
    def not_supported_reasons(self, inputs: Inputs) -> list[str]:
        reasons = super().not_supported_reasons(inputs)
        if reasons and inputs.query.device.type != "cpu":
            return reasons
        cpu.notify()
        own = cpu.supports(inputs.query, inputs.key, inputs.value, inputs.layout, inputs.bias)
        return reasons + [r for r in own if r not in reasons]

    @override
    def forward(self, inputs: Inputs) -> AttentionOutput:
        call = _resolved(inputs)
        out, lse = cpu.forward(
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
        found = cpu.backward(
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
    """Masks as layouts of 128: two blocks of rows share each tile's keys."""
    if inputs.mask is None:
        return inputs
    if inputs.query.shape[2] == 1 and inputs.mask == causal():
        return replace(inputs, mask=None)  # the last query sees every key: no layout for each step
    return inputs.resolved(128, gathers=True)
