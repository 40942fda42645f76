"""StreamingLLM: the first few tokens and a sliding window, as a mask or as a bounded cache.

Softmax rows sum to one, so heads with nothing to attend to park their mass on the first tokens.
Keeping a handful of those beside a window keeps windowed attention stable (Xiao et al. 2023, arXiv
2309.17453; section 3.1 of the survey by Su et al. 2026, arXiv 2604.10098).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from foveate.ops import Layout, Mask, sinks, window
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Pattern, mask_layout
from foveate.parts.cache import SinkWindowCache
from foveate.parts.context import Context
from foveate.parts.rope import Rope


@dataclass(frozen=True)
class SinkWindow(Pattern):
    """Query i sees key j if j <= i and (j < sinks or i - j < window), within `ctx.mask`.

    The causal half comes from `ctx.mask`; under a mask that lets tokens see later ones (an
    encoder's), the window reaches as far to the right as to the left. Positions are those of the
    sequence; with `cache` they are those inside a bounded cache, as in the paper.

    Attributes:
        sinks: tokens kept from the start (paper: 4; 1 where a sink token was trained).
        window: tokens kept from the end, the query's own included (paper: 512 to 2,000).

    Raises:
        InputError: a field that is no integer, sinks below 0 or window below 1.
    """

    sinks: int = 4
    window: int = 1024

    def __post_init__(self) -> None:
        whole("SinkWindow", "sinks", self.sinks, least=0)
        whole("SinkWindow", "window", self.window, least=1)

    @override
    def is_dense(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        # With more queries than keys, the first ones stand before them and look to the right.
        reach = max(q.shape[2], k.shape[2])
        return self.window >= reach and ctx.q_positions is None and ctx.kv_positions is None

    @override
    def rule(self, ctx: Context) -> Mask:
        band = sinks(self.sinks) | window(self.window - 1, self.window - 1)
        return band if ctx.mask is None else ctx.mask & band

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        return mask_layout(self.rule(ctx), q, k, ctx)

    def cache(
        self, rope: Rope | None = None, *, rotated: bool = False, start: Tensor | None = None
    ) -> SinkWindowCache:
        """The bounded cache of `sinks + window` tokens; see `SinkWindowCache`."""
        return SinkWindowCache(self.sinks, self.window, rope, rotated=rotated, start=start)
