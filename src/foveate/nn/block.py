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
from foveate.ops.errors import InputError
from foveate.parts.again import Again, repeatable
from foveate.parts.block_cache import BlockCache
from foveate.parts.context import Context
from foveate.parts.kv_cache import TokenCache
from foveate.parts.norm import norm_of
from foveate.parts.routing import Around, Relation
from foveate.parts.state import StateCache

Held = TokenCache | StateCache | BlockCache


class Block(nn.Module):
    """Attention or a mixer, and a feed-forward layer; see the module's text.

    Args:
        attention: the attention layer, or a mixer in its place; its dim is the block's.
        feedforward: dense or a mixture of experts.
        eps: of both norms.
        norm: "rms" or "layer".
        dropout: of the feed-forward layer's output in training.

    Raises:
        InputError: a router that reads the attention's weights, and an attention that has none to
            be read.
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
        relation = feedforward.router.relation if isinstance(feedforward, MoE) else None
        if relation is not None and relation.wants_weights:
            check_weights(attention, relation)
        carries = isinstance(attention, MixerLayer) and attention.mixer.carries
        self.attention_norm = None if carries else norm_of(norm, attention.dim, eps)
        self.attention = attention
        self.feedforward_norm = norm_of(norm, attention.dim, eps)
        self.feedforward = feedforward
        self.dropout = nn.Dropout(dropout)

    @property
    def relation(self) -> Relation | None:
        """Whom the router's tokens share with; None where each is routed on its own."""
        moe = self.feedforward
        return moe.router.relation if isinstance(moe, MoE) else None

    def new_cache(self, capacity: int = 0) -> Held:
        """An empty cache of what the block keeps of tokens, with room for `capacity` of them."""
        mixing = self.attention.new_cache(capacity)
        relation = self.relation
        if relation is None:
            return mixing
        assert isinstance(self.feedforward, MoE)
        routes = TokenCache(relation.fields(self.feedforward.router.experts), capacity)
        return BlockCache(mixing, routes)

    def forward(
        self,
        x: Tensor,
        ctx: Context,
        cache: Held | None = None,
        real: Tensor | None = None,
    ) -> LayerOutput:
        """Run the block on x (B, L, dim); real (B, L) is False on padding, None is all real.

        Raises:
            InputError: a cache that wasn't made by `new_cache`.
        """
        relation, held = self.relation, cache
        if cache is not None and isinstance(cache, BlockCache) != (relation is not None):
            raise InputError(
                f"Block: expected a cache made by new_cache(), got a {type(cache).__name__}."
            )
        around = Around(ctx)
        if relation is not None:
            if isinstance(cache, BlockCache):
                held, around.cache = cache.mixing, cache.routes
            if relation.wants_weights:
                around.again = Again()
                ctx = replace(ctx, again=around.again)
        before = self.attention_norm
        given = x if before is None else before(x)
        if isinstance(self.attention, MixerLayer):
            ctx = replace(ctx, real=real, input_norm=before)
        attended = self.attention(given, ctx=ctx, cache=held)
        x = attended.y if before is None else x + attended.y
        inner = x if before is None else self.feedforward_norm(x)
        aux = attended.aux
        if isinstance(self.feedforward, MoE):
            y, more = self.feedforward(inner, real, around)
            aux = aux | more
        else:
            y = self.feedforward(inner)
        x = x + self.dropout(y)
        return LayerOutput(self.feedforward_norm(x) if before is None else x, cache, aux)


def check_weights(layer: Attention | MixerLayer, relation: Relation) -> None:
    """Refuse an attention layer whose weights can't be applied to other values.

    Raises:
        InputError: a mixer, heads that are chosen or merged by the projection, or an attention
            that isn't told whole by its layout.
    """
    name = type(relation).__name__
    if not isinstance(layer, Attention):
        raise InputError(
            f"{name} needs an attention layer's weights, and a mixer has none; use "
            "'similarity-smoe', or 'top-k'."
        )
    p = layer.projection
    if not p.attends_once:
        raise InputError(
            f"{name} needs one matrix of weights for each head, which {type(p).__name__} doesn't "
            "have: it chooses heads, or merges several attentions; use another projection."
        )
    if not repeatable(layer.attention):
        raise InputError(
            f"{name} needs weights that a layout tells whole, and "
            f"{type(layer.attention).__name__} has none; use a pattern, such as 'full' or "
            "'sink-window'."
        )
