"""A-shape: a wide sink and a local band, MInference's static head pattern."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from foveate.methods.mminference.prefill import PrefillPattern
from foveate.ops import Layout, Mask, sinks, window
from foveate.ops.masks.checks import whole
from foveate.parts.attention import mask_layout
from foveate.parts.context import Context


@dataclass(frozen=True)
class AShape(PrefillPattern):
    """Query i sees key j if j <= i and (j < sinks or i - j < local), within `ctx.mask`.

    The causal half comes from `ctx.mask`; under a mask that lets tokens see later ones the band
    reaches as far to the right. Decoding is dense. arXiv 2407.02490, section 3; MMInference's
    search space has sinks 128 with local 1024, 2048 or 4096.

    Attributes:
        sinks: tokens at the start that all see.
        local: width of the band, the query's own token included.

    Raises:
        InputError: a field that is no integer, sinks below 0 or local below 1.
    """

    sinks: int = 128
    local: int = 1024

    def __post_init__(self) -> None:
        whole("AShape", "sinks", self.sinks, least=0)
        whole("AShape", "local", self.local, least=1)

    @override
    def _keeps_all(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        # With more queries than keys, the first ones stand before them and look to the right.
        reach = max(q.shape[2], k.shape[2])
        return self.local >= reach and ctx.q_positions is None and ctx.kv_positions is None

    @override
    def rule(self, ctx: Context) -> Mask:
        shape = sinks(self.sinks) | window(self.local - 1, self.local - 1)
        return shape if ctx.mask is None else ctx.mask & shape

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        return mask_layout(self.rule(ctx), q, k, ctx)
