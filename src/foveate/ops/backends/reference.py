"""The reference as a backend: the whole score matrix, any feature, any device."""

from __future__ import annotations

from typing_extensions import override

from foveate.ops.backends.base import Backend, Inputs
from foveate.ops.reference import reference_attention
from foveate.ops.types import AttentionOutput


class Reference(Backend):
    """Plain torch; autograd differentiates it, twice if wanted."""

    name = "reference"
    composite = True
    dropout = True
    narrow_keys = True

    @override
    def forward(self, inputs: Inputs) -> AttentionOutput:
        return reference_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.allowed(),
            scale=inputs.scale,
            softcap=inputs.softcap,
            bias=inputs.plain_bias(),
            dropout=inputs.dropout,
        )
