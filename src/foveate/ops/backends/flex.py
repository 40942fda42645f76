"""torch's FlexAttention, to be measured against: compiled once for each mask and shape.

Without compilation it holds every score, and on the CPU it has no backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops.backends.base import Backend, Inputs
from foveate.ops.types import AttentionOutput


class Flex(Backend):
    """FlexAttention over the layout's block mask."""

    name = "flex"
    composite = True
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    relative_bias = False

    @override
    def not_supported_reasons(self, inputs: Inputs) -> list[str]:
        reasons = super().not_supported_reasons(inputs)
        if inputs.needs_grad and inputs.query.device.type == "cpu":
            reasons.append("FlexAttention has no backward on the CPU")
        layout = inputs.layout
        if layout is not None and (layout.gathered is not None or layout.q_index is not None):
            reasons.append("the layout gathers single keys or rows, which a BlockMask can't")
        elif layout is not None and layout.groups[1] not in (1, inputs.query.shape[1]):
            reasons.append("heads share lists in groups; a BlockMask has one list, or one for each")
        elif layout is not None and layout.kv_index is not None:
            reasons.append("the layout gathers single keys or rows, which a BlockMask can't")
        if 0 in inputs.query.shape or 0 in inputs.key.shape:
            reasons.append("an axis of size 0")
        return reasons

    @override
    def forward(self, inputs: Inputs) -> AttentionOutput:
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention

        call = inputs.resolved(128)
        run: Any = _compiled() if call.query.device.type != "cpu" else flex_attention
        out, aux = run(
            call.query,
            call.key,
            call.value,
            score_mod=_score_mod(call.softcap, call.bias),
            block_mask=None if call.layout is None else call.layout.to_block_mask(),
            scale=call.scale,
            enable_gqa=call.query.shape[1] != call.key.shape[1],
            return_aux=AuxRequest(lse=True),
        )
        return AttentionOutput(out, aux.lse)


def _score_mod(softcap: float | None, bias: Tensor | None) -> Any:
    if softcap is None and bias is None:
        return None

    def modify(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            at = (i if size > 1 else 0 for i, size in zip((b, h, q, k), bias.shape))
            score = score + bias[tuple(at)]
        return score

    return modify


_kept: list[Any] = []


def _compiled() -> Any:
    """flex_attention compiled, once for the process."""
    if not _kept:
        from torch.nn.attention.flex_attention import flex_attention

        _kept.append(torch.compile(flex_attention))
    return _kept[0]
