"""A block: a mixing layer and a feed-forward layer, with their norms and residuals.

Pre-norm, x + attention(norm(x)) and then x + feed-forward(norm(x)); or, around a mixer that carries
x in its output (`Mixer.carries`), u = mixer(x) and then norm(u + feed-forward(u)).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from foveate.nn.attention import Attention
from foveate.nn.feedforward import GELU, SwiGLU
from foveate.nn.mixer import MixerLayer
from foveate.nn.moe import MoE
from foveate.nn.output import LayerOutput
from foveate.parts.context import Context
from foveate.parts.kv_cache import TokenCache
from foveate.parts.norm import norm_of
from foveate.parts.state import StateCache


class Block(nn.Module):
    """Attention or a mixer, and a feed-forward layer; see the module's text.

    Args:
        attention: the attention layer, or a mixer in its place; its dim is the block's.
        feedforward: dense or a mixture of experts.
        eps: of both norms.
        norm: "rms" or "layer".
        dropout: of the feed-forward layer's output in training.
    """

    def __init__(
        self,
        attention: Attention | MixerLayer,
        feedforward: SwiGLU | GELU | MoE,
        eps: float = 1e-6,
        norm: str = "rms",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        carries = isinstance(attention, MixerLayer) and attention.mixer.carries
        self.attention_norm = None if carries else norm_of(norm, attention.dim, eps)
        self.attention = attention
        self.feedforward_norm = norm_of(norm, attention.dim, eps)
        self.feedforward = feedforward
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        ctx: Context,
        cache: TokenCache | StateCache | None = None,
        real: Tensor | None = None,
    ) -> LayerOutput:
        """Run the block on x (B, L, dim); real (B, L) is False on padding, None is all real."""
        before = self.attention_norm
        given = x if before is None else before(x)
        if isinstance(self.attention, MixerLayer):
            ctx = replace(ctx, real=real, input_norm=before)
        attended = self.attention(given, ctx=ctx, cache=cache)
        x = attended.y if before is None else x + attended.y
        inner = x if before is None else self.feedforward_norm(x)
        aux = attended.aux
        if isinstance(self.feedforward, MoE):
            y, more = self.feedforward(inner, real)
            aux = aux | more
        else:
            y = self.feedforward(inner)
        x = x + self.dropout(y)
        return LayerOutput(self.feedforward_norm(x) if before is None else x, attended.cache, aux)
