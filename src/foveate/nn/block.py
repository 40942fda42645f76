"""A pre-norm block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

from __future__ import annotations

from torch import Tensor, nn

from foveate.nn.attention import Attention
from foveate.nn.feedforward import SwiGLU
from foveate.nn.moe import MoE
from foveate.nn.output import LayerOutput
from foveate.parts.context import Context
from foveate.parts.kv_cache import TokenCache
from foveate.parts.norm import RMSNorm
from foveate.parts.state import StateCache


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind an RMSNorm and beside a residual.

    Args:
        attention: the attention layer; its dim is the block's.
        feedforward: dense or a mixture of experts.
        eps: of both norms.
    """

    def __init__(self, attention: Attention, feedforward: SwiGLU | MoE, eps: float = 1e-6) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(attention.dim, eps)
        self.attention = attention
        self.feedforward_norm = RMSNorm(attention.dim, eps)
        self.feedforward = feedforward

    def forward(
        self,
        x: Tensor,
        ctx: Context,
        cache: TokenCache | StateCache | None = None,
        real: Tensor | None = None,
    ) -> LayerOutput:
        """Run the block on x (B, L, dim); real (B, L) is False on padding, None is all real."""
        attended = self.attention(self.attention_norm(x), ctx=ctx, cache=cache)
        x = x + attended.y
        inner = self.feedforward_norm(x)
        aux = attended.aux
        if isinstance(self.feedforward, MoE):
            y, more = self.feedforward(inner, real)
            aux = aux | more
        else:
            y = self.feedforward(inner)
        return LayerOutput(x + y, attended.cache, aux)
