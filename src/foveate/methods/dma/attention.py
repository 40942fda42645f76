"""Trainable dynamic mask attention: each query keeps the w keys of the largest learnt importance.

    z[t, j] = s q_t . k_j + delta[g, j] for j in S_t, else -inf;   o_t = softmax(z_t) V

Shi et al. 2025, arXiv 2508.02124; DogeAttention in transformers. delta is made from the values
(see `importance`), S_t shared by the query heads of a key/value head (see `keep`). It is added to
the logits as well, which is what trains it: the choice itself has no gradient.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from foveate.methods.dma.importance import Form, Importance, Scored
from foveate.methods.dma.layout import Kept, kept, layouts
from foveate.ops import AttentionOutput, attention, merge
from foveate.ops.attention import with_sinks
from foveate.ops.errors import InputError
from foveate.parts.attention import Attention, mask_layout
from foveate.parts.context import Context
from foveate.parts.form import is_causal_or_full
from foveate.parts.tokens import Tokens, tokens_of

Select = Literal["top", "relu"]


class DynamicMask(nn.Module, Attention):
    """One layer's dynamic mask attention, with its W_dt and A.

    Args:
        importance: of the keys.
        window: w, keys that a query keeps; no window of recent ones, despite the paper's name.
        select: "top", the w best; or "relu", all keys whose delta is above 0.
        smooth: keys of a block for block smoothing, 0 for none.
    """

    def __init__(self, importance: Importance, window: int, select: Select, smooth: int) -> None:
        super().__init__()
        self.importance, self.window = importance, window
        self.select, self.smooth = select, smooth

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Attend; shapes as in `foveate.parts.Attention`.

        Raises:
            InputError: a mask that isn't causal, or more than causal and padding; other heads.
        """
        ctx = Context() if ctx is None else ctx
        scored = self.importance(v)
        bias = added(scored.bias, q.shape[1], ctx)
        if self.keeps_all(k.shape[2]):
            self.tokens(q, k, ctx)
            return _dense(q, k, v, bias, ctx)
        found = self.kept(scored, q, k, ctx)
        return over(q, k, v, found, bias, ctx)

    def keeps_all(self, kv_len: int) -> bool:
        """Whether every query keeps all that it may see."""
        return self.select == "top" and kv_len <= self.window

    @torch.no_grad()
    def kept(self, scored: Scored, q: Tensor, k: Tensor, ctx: Context) -> Kept:
        """Who keeps which key of this call."""
        tokens = self.tokens(q, k, ctx)
        real = None if bool(tokens.k_real.all()) else tokens.k_real
        relu = scored.bias > 0 if self.select == "relu" else None
        start = k.shape[2] - q.shape[2]
        return kept(scored.rank, self.window, relu, self.smooth, real, start)

    def tokens(self, q: Tensor, k: Tensor, ctx: Context) -> Tokens:
        """The tokens of a call.

        Raises:
            InputError: a mask that isn't causal, or more than causal and padding.
        """
        tokens = tokens_of(q, k, ctx)
        aligned = bool((tokens.shift == k.shape[2] - q.shape[2]).all())
        if not (tokens.causal and aligned and is_causal_or_full(ctx, tokens)):
            raise InputError(
                "dma keeps the best of the keys up to a query: its mask must be causal(), with "
                "padding at most (no mask is everything). Give Context(mask=causal()), packed "
                "sequences as rows of a batch."
            )
        return tokens

    def extra_repr(self) -> str:
        """What torch prints of it."""
        form = self.importance.form
        return f"window={self.window}, {form=}, select={self.select!r}, smooth={self.smooth}"


def added(delta: Tensor, heads: int, ctx: Context) -> Tensor:
    """(B, Hq, 1 or Lq, L): delta (B, G, L) for each query head, and the call's own bias."""
    bias = delta.repeat_interleave(heads // delta.shape[1], 1)[:, :, None]
    return bias if ctx.bias is None else bias + ctx.bias


def over(
    q: Tensor, k: Tensor, v: Tensor, found: Kept, bias: Tensor, ctx: Context
) -> AttentionOutput:
    """Attention over the keys that are kept."""
    options = ctx.options | {"bias": bias, "sink_logits": None}
    with torch.no_grad():
        parts = layouts(found, q.shape[2])
    result = merge([attention(q, k, v, layout=part, **options) for part in parts])
    return result if ctx.sink_logits is None else with_sinks(result, ctx.sink_logits)


def _dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, ctx: Context) -> AttentionOutput:
    options = ctx.options | {"bias": bias}
    if ctx.q_positions is None and ctx.kv_positions is None:
        return attention(q, k, v, ctx.mask, **options)
    return attention(q, k, v, layout=mask_layout(ctx.mask, q, k, ctx), **options)


def check_select(select: str) -> None:
    """Refuse a rule that isn't known.

    Raises:
        InputError: it isn't.
    """
    if select not in get_args(Select):
        raise InputError(f"DMA(select={select!r}): expected {', '.join(get_args(Select))}.")


__all__ = ["DynamicMask", "Form", "Select", "added", "check_select", "over"]
