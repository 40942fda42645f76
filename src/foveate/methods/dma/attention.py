"""Trainable dynamic mask attention: each query keeps the w keys of the largest learnt importance.

    z[t, j] = s q_t . k_j + delta[g, j] for j in S_t, else -inf;   o_t = softmax(z_t) V

Shi et al. 2025, arXiv 2508.02124; DogeAttention in transformers. delta is made from the values
(see `importance`), S_t shared by the query heads of a key/value head (see `keep`). It is added to
the logits as well, which is what trains it: the choice itself has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.dma.importance import FORMS, Form, Importance, Scored
from foveate.methods.dma.layout import Kept, kept, layouts, tile_for
from foveate.methods.dma.state import KeptKeys
from foveate.ops import AttentionOutput, attention, merge
from foveate.ops.attention import with_sinks
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import AttentionRecipe, Heads, mask_layout
from foveate.parts.context import Context
from foveate.parts.form import is_causal_or_full
from foveate.parts.state import State, Stateful
from foveate.parts.tokens import Tokens, tokens_of

Select = Literal["top", "relu"]


class DynamicMask(Stateful, nn.Module):
    """One layer's dynamic mask attention, with its W_dt and A.

    Args:
        heads: of the layer.
        window: w, keys that a query keeps; no window of recent ones, despite the paper's name.
        form: of the importance, "exp" or "log".
        select: "top", the w best; or "relu", all keys whose delta is above 0.
        smooth: keys of a block for block smoothing, 0 for none.
        bias: whether W_dt has one.
    """

    def __init__(
        self,
        heads: Heads,
        window: int,
        form: Form = "exp",
        select: Select = "top",
        smooth: int = 0,
        *,
        bias: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.heads = heads
        self.importance = Importance(heads.kv, heads.value_dim, form, bias=bias)
        self.window, self.select, self.smooth = window, select, smooth

    def full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
        """All tokens at once, or the last ones against all; shapes as in a call.

        Raises:
            InputError: a mask that isn't causal, or more than causal and padding; other heads.
        """
        tokens = self._tokens(q, k, ctx)
        scored = self.importance(v)
        bias = added(scored.bias, q.shape[1], ctx)
        if self.select == "top" and k.shape[2] <= self.window:  # smoothing leaves all of all
            return _dense(q, k, v, bias, ctx)
        if not bool(tokens.k_real.all()):
            scored = scored._replace(
                rank=scored.rank.masked_fill(~tokens.k_real[:, None], -torch.inf)
            )
        seen = self.kept(scored, k.shape[2] - q.shape[2])
        return over(q, k, v, seen, bias, ctx, tile_for(self.window))

    def new_state(self) -> KeptKeys:
        """An empty state: w keys of each head, or all where others than the w best are seen."""
        heads = self.heads
        limit = self.window if self.select == "top" and not self.smooth else None
        return KeptKeys(heads.kv, heads.key_dim, heads.value_dim, limit)

    def step(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State) -> AttentionOutput:
        """New tokens against those that are still kept.

        Raises:
            InputError: as `full`; or a bias for each position, of which most aren't there.
        """
        assert isinstance(state, KeptKeys)
        if ctx.bias is not None:
            raise InputError("dma: a bias for each position can't be had where keys are dropped.")
        if ctx.mask is None or ctx.mask.spec != "causal()":
            every = k.new_empty(1).expand(*k.shape[:2], len(state) + k.shape[2], k.shape[3])
            self._tokens(q, every, ctx)
        scored = self.importance(v)
        rank = scored.rank
        if ctx.real is not None:
            rank = rank.masked_fill(~ctx.real[:, None], -torch.inf)
        if k.shape[2] == 1 and state.size == state.limit and not torch.is_grad_enabled():
            state.replace(k, v, rank)
            held = self._held(state, q)
            return attention(q, held.k, held.v, **ctx.options | {"bias": held.bias})
        start = state.size
        state.append(k, v, rank)
        held = self._held(state, q)
        if self.window >= state.size and k.shape[2] == 1 and self.select == "top":
            result = attention(q, held.k, held.v, **ctx.options | {"bias": held.bias})
        else:
            scored = Scored(held.delta, state.held["rank"])
            result = over(
                q, held.k, held.v, self.kept(scored, start), held.bias, ctx, tile_for(self.window)
            )
        state.cut()
        return result

    def _held(self, state: KeptKeys, q: Tensor) -> _Held:
        """What the state holds, ready to be attended to."""
        k, v, rank = (state.held[name] for name in ("k", "v", "rank"))
        delta = self.importance.bias_of(rank)
        # What is no key counts nowhere: exp(-inf) alone would leave it a share.
        hidden = delta.masked_fill(rank == -torch.inf, -torch.inf)
        bias = hidden.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
        return _Held(k, v, delta, bias)

    @torch.no_grad()
    def kept(self, scored: Scored, start: int) -> Kept:
        """Who keeps which key, for the queries from index `start` of the keys on.

        A rank of -inf is padding.
        """
        relu = scored.bias > 0 if self.select == "relu" else None
        return kept(scored.rank, self.window, relu, self.smooth, start)

    def _tokens(self, q: Tensor, k: Tensor, ctx: Context) -> Tokens:
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


class _Held(NamedTuple):
    """k, v (B, G, n, ...), delta (B, G, n), bias (B, Hq, 1, n), -inf where no key is."""

    k: Tensor
    v: Tensor
    delta: Tensor
    bias: Tensor


def added(delta: Tensor, heads: int, ctx: Context) -> Tensor:
    """(B, Hq, 1 or Lq, L): delta (B, G, L) for each query head, and the call's own bias."""
    bias = delta.repeat_interleave(heads // delta.shape[1], 1)[:, :, None]
    return bias if ctx.bias is None else bias + ctx.bias


def over(
    q: Tensor, k: Tensor, v: Tensor, seen: Kept, bias: Tensor, ctx: Context, tile: int
) -> AttentionOutput:
    """Attention over the keys that are kept."""
    options = ctx.options | {"bias": bias, "sink_logits": None}
    with torch.no_grad():
        parts = layouts(seen, q.shape[2], tile)
    found = [attention(q, k, v, layout=part, **options) for part in parts]
    result = found[0] if len(found) == 1 else merge(found)
    return result if ctx.sink_logits is None else with_sinks(result, ctx.sink_logits)


def _dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, ctx: Context) -> AttentionOutput:
    options = ctx.options | {"bias": bias}
    if ctx.q_positions is None and ctx.kv_positions is None:
        return attention(q, k, v, ctx.mask, **options)
    return attention(q, k, v, layout=mask_layout(ctx.mask, q, k, ctx), **options)


@dataclass(frozen=True)
class DMA(AttentionRecipe):
    """Dynamic mask attention: w keys for each query, chosen by an importance learnt from values.

    Causal. While the keys number at most `window`, nothing is left out; delta is still added.

    Attributes:
        window: w (2048; the paper's keep_window_size).
        form: of the importance that is added to the logits: "exp" as in transformers' Doge models
            and the paper's first version, or "log" as in the later kernels.
        select: "top", the w best keys; or "relu", all whose delta is above 0, however many.
        smooth: keys of a block for block smoothing, so that tiles are kept or skipped whole; 0 is
            none.
        bias: whether W_dt has a bias.

    Raises:
        InputError: a field that doesn't fit.
    """

    window: int = 2048
    form: Form = "exp"
    select: Select = "top"
    smooth: int = 0
    bias: bool = False

    def __post_init__(self) -> None:
        whole("DMA", "window", self.window, least=1)
        whole("DMA", "smooth", self.smooth, least=0)
        for name, kinds in (("form", FORMS), ("select", get_args(Select))):
            if getattr(self, name) not in kinds:
                raise InputError(
                    f"DMA({name}={getattr(self, name)!r}): expected {', '.join(kinds)}."
                )

    @override
    def build(self, heads: Heads) -> DynamicMask:
        return DynamicMask(heads, self.window, self.form, self.select, self.smooth, bias=self.bias)

    def pairs(self, length: int) -> int:
        """Pairs of query and key that a head works on at most over `length` tokens."""
        if self.select == "relu":
            return length * (length + 1) // 2
        kept = min(self.window, length)
        at_most = 2 if self.smooth else 1  # more than half of a block that counts whole is kept
        whole = kept * (kept + 1) // 2 + (length - kept) * kept
        return min(at_most * whole, length * (length + 1) // 2)
