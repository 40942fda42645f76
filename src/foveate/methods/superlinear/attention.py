"""Superlinear multi-step attention: search among anchors, then attention in the spans before them.

    1. anchors      a_m = t + 1 - floor(m^(1/p)),  m > w_i
    2. span-search  sigma_m = Q1_t . K_{a_m};  the best k
    3. spans        max(first, a - ceil(b_b n^p_s)) ... min(a + ceil(b_f n^p_s), t, window - 1)
    4. attention    o_j = softmax over span_j and window of Q2_t . K / sqrt(d), times V
    5. combination  g = softmax(sigma of the k best);  O_t = sum_j g_j o_j

Huang 2026, arXiv 2601.18401 (N = 2, the one that is defined in full). Routing is trained through g:
dL/dsigma_j = g_j (dO . o_j - dO . O). A key at an anchor can only stand for those before it where
the layer's input carries a summary of them: a recurrent layer in front, as in the paper's model,
is part of the architecture, and so are layers without rotary positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.superlinear.powers import counted, distances, reach, window_length
from foveate.methods.superlinear.search import best_anchors
from foveate.ops import AttentionOutput, Layout, attention, merge, mix, window
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention, AttentionRecipe, Heads, mask_layout
from foveate.parts.context import Context
from foveate.parts.form import is_causal_or_full
from foveate.parts.lifetimes import layout_of_spans
from foveate.parts.projection import split_heads
from foveate.parts.tokens import tokens_of

_TILE = (32, 32)


class Routes(NamedTuple):
    """Where each query looks: anchors, and the spans low ... high - 1; each (B, Hq, Lq, k) int64.

    An anchor of -1 is none, and its span is empty.
    """

    anchors: Tensor
    low: Tensor
    high: Tensor


class MultiStep(nn.Module, Attention):
    """One layer's superlinear attention, with its W_s.

    A layer of it has no rotary positions, whatever its `position` says: the search multiplies keys
    with routing queries that aren't turned.

    Args:
        heads: of the layer.
        recipe: the hyper-parameters.
    """

    rotary: ClassVar[bool] = False
    sized: ClassVar[bool] = True

    def __init__(self, heads: Heads, recipe: Superlinear) -> None:
        super().__init__()
        self.heads, self.recipe = heads, recipe
        self.routing = nn.Linear(heads.dim, heads.query * heads.key_dim, bias=False)
        self.window = window_length(recipe.index, recipe.power)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Attend; shapes as in `foveate.parts.Attention`, the lse is NaN: outputs are mixed.

        Raises:
            InputError: no hidden states, a mask that isn't causal, or one that is more than causal
                and padding, a bias for each position, or learnt sinks.
        """
        ctx = Context() if ctx is None else ctx
        first = first_real(q, k, ctx)
        if not q.shape[0] or self.window >= k.shape[2]:  # the window is everything there is
            return AttentionOutput(_dense(q, k, v, ctx).out, _no_lse(q))
        routing = self.routes_with(ctx, q)
        with torch.no_grad():
            routes = self.routes(routing, k, first)
        return AttentionOutput(self.mixed(q, k, v, routing, routes, first, ctx), _no_lse(q))

    def routes_with(self, ctx: Context, q: Tensor) -> Tensor:
        """Q1 = X W_s, (B, Hq, Lq, D)."""
        if ctx.hidden is None or ctx.hidden.shape[:2] != (q.shape[0], q.shape[2]):
            got = None if ctx.hidden is None else tuple(ctx.hidden.shape)
            raise InputError(
                "superlinear makes its routing queries of the layer's input: expected ctx.hidden "
                f"({q.shape[0]}, {q.shape[2]}, {self.heads.dim}), got {got}. foveate.Attention "
                "hands it over."
            )
        return split_heads(self.routing(ctx.hidden), self.heads.query)

    @torch.no_grad()
    def routes(self, routing: Tensor, k: Tensor, first: Tensor) -> Routes:
        """Steps 1 to 3: the best anchors of each query and their spans."""
        r = self.recipe
        # For more tokens than there are: the same table serves many steps of decoding.
        behind = distances(1 << k.shape[2].bit_length(), r.power, r.index + 1)
        anchors = best_anchors(routing, k, behind, first, r.spans)
        at = torch.arange(k.shape[2] - routing.shape[2], k.shape[2], device=k.device)
        n = at + 1 - first[:, None]  # (B, Lq)
        back, ahead = (reach(b, n, r.span_power)[:, None, :, None] for b in (r.backward, r.forward))
        low = (anchors - back).maximum(first[:, None, None, None])
        last = at - self.window if self.window else at  # before the window, or the query itself
        high = (anchors + ahead).minimum(last[:, None]) + 1
        none = anchors < 0
        return Routes(anchors, low.masked_fill(none, 0), high.masked_fill(none, 0))

    def mixed(
        self, q: Tensor, k: Tensor, v: Tensor, routing: Tensor, routes: Routes, first: Tensor,
        ctx: Context,
    ) -> Tensor:  # fmt: skip
        """Steps 4 and 5: (B, Hq, Lq, Dv)."""
        spans = self.recipe.spans
        # A head for each span: span j of query head h is head h k + j, on h's own keys.
        wide = q.repeat_interleave(spans, 1)
        low, high = (x.transpose(2, 3).flatten(1, 2) for x in (routes.low, routes.high))
        layout = layout_of_spans(low, high, k.shape[2], tile_for(q.shape[2]), by_end=True)
        found = attention(wide, k, v, layout=layout, **ctx.options)
        parts = [
            AttentionOutput(out, lse)
            for out, lse in zip(
                found.out.unflatten(1, (-1, spans)).unbind(2),
                found.lse.unflatten(1, (-1, spans)).unbind(2),
            )
        ]
        if self.window:
            near = self._window(q, k, v, first, ctx)
            parts = [merge([near, part]) for part in parts]
        gates = torch.softmax(self.scores(routing, k, routes.anchors), -1)
        return mix(gates.unbind(-1), [part.out.to(gates.dtype) for part in parts]).to(q.dtype)

    def scores(self, routing: Tensor, k: Tensor, anchors: Tensor) -> Tensor:
        """Sigma of the chosen anchors, differentiable: (B, Hq, Lq, k) in fp32 or wider.

        -inf where there is no anchor; 0 for a query without any, whose parts are all its window.
        """
        work = torch.promote_types(routing.dtype, torch.float32)
        batch, groups, _, dim = k.shape
        at = anchors.clamp_min(0).unflatten(1, (groups, -1)).flatten(2)  # (B, G, R Lq k)
        picked = k.gather(2, at[..., None].expand(-1, -1, -1, dim)).to(work)
        picked = picked.view(*anchors.shape, dim)
        sigma = (routing.to(work)[:, :, :, None] * picked).sum(-1)
        none = anchors < 0
        return sigma.masked_fill(none, -torch.inf).masked_fill(none.all(-1, keepdim=True), 0.0)

    def _window(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor, ctx: Context
    ) -> AttentionOutput:
        near = window(self.window - 1, 0)
        if not bool(first.any()):
            return attention(q, k, v, near, **ctx.options)
        at = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=k.device)
        low = (at + 1 - self.window).maximum(first[:, None])[:, None]
        layout = layout_of_spans(low, (at + 1).expand_as(low), k.shape[2], tile_for(q.shape[2]))
        return attention(q, k, v, layout=layout, **ctx.options)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return repr(self.recipe)


def tile_for(q_len: int) -> tuple[int, int]:
    """Rows and keys of a tile: no empty rows for a few queries."""
    return min(_TILE[0], max(8, -(-q_len // 8) * 8)), _TILE[1]


def first_real(q: Tensor, k: Tensor, ctx: Context) -> Tensor:
    """(B,) index of each sequence's first real key.

    Where there is no padding nothing is looked at, so that a step of decoding stays sublinear.

    Raises:
        InputError: a mask that isn't causal, or more than causal and padding; or what the mixture
            of several softmaxes has no place for.
    """
    if ctx.bias is not None or ctx.sink_logits is not None:
        raise InputError("superlinear takes no bias for each position and no learnt sinks.")
    plain = ctx.q_positions is None and ctx.kv_positions is None
    if plain and ctx.mask is not None and ctx.mask.spec == "causal()":
        return torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
    tokens = tokens_of(q, k, ctx)
    aligned = bool((tokens.shift == k.shape[2] - q.shape[2]).all())
    if not (tokens.causal and aligned and is_causal_or_full(ctx, tokens)):
        raise InputError(
            "superlinear searches among earlier keys: its mask must be causal(), with padding at "
            "most (no mask is everything). Give Context(mask=causal()), packed sequences as rows "
            "of a batch."
        )
    return tokens.k_real.int().argmax(1).expand(k.shape[0])


def _no_lse(q: Tensor) -> Tensor:
    """NaN: a mixture of several softmaxes has no log-sum-exp."""
    return q.new_full(q.shape[:3], torch.nan, dtype=torch.promote_types(q.dtype, torch.float32))


def _dense(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
    if ctx.q_positions is None and ctx.kv_positions is None:
        return attention(q, k, v, ctx.mask, **ctx.options)
    layout: Layout = mask_layout(ctx.mask, q, k, ctx)
    return attention(q, k, v, layout=layout, **ctx.options)


@dataclass(frozen=True)
class Superlinear(AttentionRecipe):
    """Attention in a few spans that each query finds by a search: O(L^(1 + p)) pairs. Causal.

    Attributes:
        spans: k, spans that each query attends in (paper's kernels: 2 or 3).
        index: w_i; the last floor((w_i + 1)^(1/p)) - 1 tokens, the query included, are seen by
            every query beside each span. 0 is no window.
        backward: b_b; a span reaches back ceil(b_b n^p_s) tokens from its anchor, n tokens so far.
        forward: b_f; and so many on from it, at most up to the query or its window.
        power: p of the anchors' distances (1/2; 0.54 for the paper's L^1.54).
        span_power: p_s.

    Raises:
        InputError: a field that doesn't fit.
    """

    spans: int = 3
    index: int = 0
    backward: float = 2.0
    forward: float = 0.0
    power: float = 0.5
    span_power: float = 0.5

    def __post_init__(self) -> None:
        whole("Superlinear", "spans", self.spans, least=1)
        whole("Superlinear", "index", self.index, least=0)
        for name in ("backward", "forward", "power", "span_power"):
            value = getattr(self, name)
            top = 1.0 if name.endswith("power") else math.inf
            least = name.endswith("power")
            if not isinstance(value, int | float) or not (0 <= value <= top) or math.isinf(value):
                raise InputError(f"Superlinear({name}={value!r}): expected a number from 0 on.")
            if least and not 0 < value < 1:
                raise InputError(f"Superlinear({name}={value!r}): expected a number in (0, 1).")

    @override
    def build(self, heads: Heads) -> MultiStep:
        return MultiStep(heads, self)

    def pairs(self, length: int) -> int:
        """Pairs of query and key that a head works on at most over `length` tokens."""
        return counted(
            length,
            power=self.power,
            span_power=self.span_power,
            backward=self.backward,
            forward=self.forward,
            spans=self.spans,
            index=self.index,
        ).total
