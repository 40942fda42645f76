"""`foveate.Attention`: the one composable layer, a projection and an attention put together."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.methods import make
from foveate.nn.output import LayerOutput
from foveate.nn.position import counted, rope_for, turned
from foveate.nn.sinks import sinks_of
from foveate.nn.stateful import check_stateful, heads_of, new_keys
from foveate.ops import Mask
from foveate.ops.errors import InputError
from foveate.parts import Attention as Method
from foveate.parts import AttentionRecipe
from foveate.parts.context import Context, Phase
from foveate.parts.kv_cache import TokenCache
from foveate.parts.projection import QKV, Positions, Projection, Recipe, Sizes
from foveate.parts.rope import Rope
from foveate.parts.state import StateCache, Stateful
from foveate.parts.tokens import queries_that_are, tokens_of


class Attention(nn.Module):
    """An attention layer: x (B, L, dim) -> y (B, L, dim), in training, prefill and decoding.

        layer = foveate.Attention(512, 8, projection="mfa", attention="sink-window(window=256)")
        y, _, aux = layer(x, mask=foveate.causal())

        cache = layer.new_cache()
        y, cache, _ = layer(prompt, mask=foveate.causal(), cache=cache)
        y, cache, _ = layer(token, mask=foveate.causal(), cache=cache)      # the same numbers

    As in `foveate.attention`, no mask means that every token sees every token.

    Args:
        dim: width of x and y.
        num_heads: heads of the model, as the projection counts them.
        projection: a key of the catalog with its hyper-parameters, such as "gqa(kv_heads=2)"; its
            recipe; or a projection that was built already, whose sizes then count.
        attention: a key of the catalog, any attention of `foveate.parts`, or a recipe of one that
            has parameters of its own.
        position: "rope", a `Rope`, or "none".
        theta: base of the rotary frequencies, where position is "rope".
        interleaved: whether rotary pairs are neighbours; None is the projection's own habit.
        head_dim: width of a head; None is dim / num_heads or the projection's own.
        kv_dim: width of x_kv, for cross-attention; None is dim.
        bias: biases on the maps into heads.
        out_bias: a bias on the map out of them.
        dropout: probability of dropping an attention weight in training.
        sink_logits: "one" more term e^0 in each row's sum (softmax off by one), or a "learned"
            logit for each query head, as in gpt-oss; see `foveate.nn.sinks` for these three.
        kv_bias: one more key, value or "key-value" that all queries see, for each query head or,
            as in "key-shared", one for all.
        gate: a sigmoid of the layer's input on each "head"'s output, or on each "element" of it.
        layer: index of the layer, for methods that differ by layer.

    Raises:
        UnknownMethodError: no such projection or attention.
        InputError: sizes don't fit, or a name of the wrong kind.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        projection: str | Recipe | Projection = "mha",
        attention: str | Method | AttentionRecipe = "full",
        position: str | Rope | None = "rope",
        *,
        theta: float = 10_000.0,
        interleaved: bool | None = None,
        head_dim: int | None = None,
        kv_dim: int | None = None,
        bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
        sink_logits: str | None = None,
        kv_bias: str | None = None,
        gate: str | None = None,
        layer: int = 0,
    ) -> None:
        super().__init__()
        sizes = Sizes(dim, num_heads, head_dim, kv_dim, bias, out_bias)
        self.dim, self.kv_dim, self.layer = dim, sizes.source, layer
        if not 0 <= dropout < 1:
            raise InputError(f"Attention(dropout={dropout!r}): expected 0 up to, not with, 1.")
        self.dropout = dropout
        self.projection = _projection(projection, sizes)
        self.attention = _attention(attention, self.projection, dim, layer)
        if isinstance(self.attention, Stateful):
            check_stateful(self.attention, self.projection)
        if getattr(self.attention, "evicts", False):
            raise InputError(
                f"Attention(attention={type(self.attention).__name__}): it drops keys from "
                "transformers' caches, and this layer keeps its own; use it on a model of "
                "transformers: foveate.use(model, ...)."
            )
        self.sinks = sinks_of(
            self.attention, self.projection, dim, sink_logits, kv_bias, gate
        )  # fmt: skip
        position = position if self.attention.rotary else None
        self.rope = rope_for(position, self.projection, theta, interleaved)

    def new_cache(self, capacity: int = 0) -> TokenCache | StateCache:
        """An empty cache for this layer, with room for `capacity` tokens."""
        if isinstance(self.attention, Stateful):
            return StateCache(self.attention.new_state())
        return self.projection.new_cache(capacity)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        *,
        mask: Mask | None = None,
        cache: TokenCache | StateCache | None = None,
        ctx: Context | None = None,
    ) -> LayerOutput:
        """Run the layer.

        Args:
            x: (B, Lq, dim), the new tokens.
            x_kv: (B, L, kv_dim), where keys and values come from; None is x.
            mask: who may attend, over the Lkv = len(cache) + L keys; None is everyone.
            cache: what earlier calls kept; the new tokens are added to it.
            ctx: more that is known: positions (of queries, and of all Lkv keys), phase, bias, ...
                Without it a single token against a cache is decoding, training is as the module.

        Returns:
            y (B, Lq, dim), the cache, and losses and statistics by name.

        Raises:
            InputError: shapes don't fit, or a mask both here and in ctx.
        """
        x_kv = self._checked(x, x_kv)
        kind = StateCache if isinstance(self.attention, Stateful) else TokenCache
        if cache is not None and not isinstance(cache, kind):
            raise InputError(
                f"Attention: expected a {kind.__name__} made by new_cache(), got a "
                f"{type(cache).__name__}."
            )
        past = 0 if cache is None else len(cache)
        known = self._context(x, mask, past, ctx)
        crossed = x_kv is not x
        known.hidden, known.cache = None if crossed else x, cache
        known.weights = self.projection.maps
        if isinstance(self.attention, Stateful) and isinstance(cache, StateCache):
            past += x_kv.shape[1]
            x_kv = self.attention.recalled(x, x_kv, cache.state)
            past -= x_kv.shape[1]
        where = _positions(known, x.shape[1], past, x_kv)
        p = self.projection
        q = p.query(x)
        raw_query = q
        tokens = cache if isinstance(cache, TokenCache) else None
        new = p.entries(x_kv, tokens, known.phase)
        if isinstance(self.attention, Stateful):
            known.raw_key = p.expand(new)[0]  # entries are plain heads there
        at = where
        if past and not p.rotates_on_read:
            at = where._replace(key=_tail(where.key, past, known))
        if not p.rotates_on_read:
            q, new = self.rotated(q, new, at, known)
        held = new if tokens is None else tokens.append(new)
        if p.rotates_on_read:
            q, held = self.rotated(q, held, at, known)
        absorbed = p.absorbs(known.phase) and not self.attention.sized
        qkv = p.absorb(q, held) if absorbed else QKV(q, *p.expand(held))
        if p.selects or isinstance(self.attention, Stateful):
            keys = new_keys(qkv.k, past + x_kv.shape[1])
            known.real = _real(qkv.q, keys, known, crossed)
        selection = None
        if p.selects:
            selection = p.select(x, raw_query, known.real, known.phase)
        if not absorbed:
            known.raw_query = raw_query
        around = self.attention if self.sinks is None else self.sinks.around(self.attention)
        o = p.attend(around, qkv, known, selection)
        if known.again is not None:
            beside = None if self.sinks is None else self.sinks.weighed(known)
            output = partial(self._output, x, absorbed)
            known.again.fill(self.attention, qkv, known, o, output, beside)
        aux = known.aux if selection is None else known.aux | selection.aux
        return LayerOutput(self._output(x, absorbed, o), cache, aux)

    def _output(self, x: Tensor, absorbed: bool, heads: Tensor) -> Tensor:
        gated = heads if self.sinks is None else self.sinks.gated(heads, x)
        return self.projection.output(gated, x, absorbed=absorbed)

    def rotated(
        self, q: Tensor, entries: dict[str, Tensor], at: Positions, ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The projection's `rotate`, with the layer's positions; tables are kept in `ctx.store`."""
        rope = self.rope
        if rope is None:
            return self.projection.rotate(q, entries, at, lambda x, _: x)
        return self.projection.rotate(
            q, entries, at, lambda x, positions: turned(rope, x, positions, ctx.store)
        )

    def _context(self, x: Tensor, mask: Mask | None, past: int, ctx: Context | None) -> Context:
        if ctx is None:
            phase: Phase = "train" if self.training and not past else "prefill"
            ctx = Context(phase="decode" if past and x.shape[1] == 1 else phase, mask=mask)
            ctx.layer = self.layer
        elif mask is not None and ctx.mask is not None:
            raise InputError("Attention: give the mask as mask= or in ctx, not both.")
        else:
            # A context that tells no layer is for any: the layer knows its own index.
            ctx = replace(
                ctx, mask=ctx.mask if mask is None else mask, layer=ctx.layer or self.layer
            )
        ctx.aux = {}  # this layer's own
        if self.dropout and self.training:
            ctx.dropout = self.dropout
        if ctx.scale is None:
            ctx.scale = self.projection.scale
        if self.sinks is not None and self.sinks.logits is not None:
            if ctx.sink_logits is not None:
                raise InputError("Attention: the layer has sink logits; leave ctx.sink_logits out.")
            ctx.sink_logits = self.sinks.logits
        return ctx

    def _checked(self, x: Tensor, x_kv: Tensor | None) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise InputError(f"Attention: expected x (B, L, {self.dim}), got {tuple(x.shape)}.")
        if x_kv is None:
            x_kv = x
        if x_kv.dim() != 3 or x_kv.shape[0] != len(x) or x_kv.shape[2] != self.kv_dim:
            raise InputError(
                f"Attention: expected x_kv ({len(x)}, L, {self.kv_dim}), got {tuple(x_kv.shape)}."
            )
        return x_kv

    def extra_repr(self) -> str:
        """What torch prints of it."""
        position = "none" if self.rope is None else "rope"
        shown = "" if isinstance(self.attention, nn.Module) else f", attention={self.attention}"
        return f"{self.dim}, position={position}{shown}"


def _real(q: Tensor, k: Tensor, ctx: Context, crossed: bool) -> Tensor | None:
    """(B, Lq) bool: tokens that aren't padding; None where the mask knows none.

    Queries that are other tokens than the keys (`crossed`) are all real, unless the context says
    which: a mask's padding is that of keys, and only a causal one tells where queries stand.
    """
    if crossed and ctx.real is not None:
        return ctx.real
    if ctx.mask is None or ctx.mask.spec == "causal()":
        return None
    tokens = tokens_of(q, k, ctx)
    if crossed and not tokens.causal:
        return torch.ones(len(q), q.shape[2], dtype=torch.bool, device=q.device)
    return queries_that_are(tokens).expand(len(q), -1)


def _positions(ctx: Context, q_len: int, past: int, x_kv: Tensor) -> Positions:
    """Of the new queries, and of all keys."""
    kv_len = past + x_kv.shape[1]
    key, query = ctx.kv_positions, ctx.q_positions
    if key is None:
        key = counted(ctx.store, 0, kv_len, x_kv.device)
    if query is None:  # the last query stands with the last key
        start = kv_len - q_len
        before = start < 0 or ctx.kv_positions is None
        query = counted(ctx.store, start, kv_len, x_kv.device) if before else key[..., start:]
    if key.shape[-1] != kv_len or query.shape[-1] != q_len:
        raise InputError(
            f"Attention: positions are for {query.shape[-1]} queries and {key.shape[-1]} keys, "
            f"but there are {q_len} and {kv_len} (with what the cache holds)."
        )
    return Positions(query, key)


def _tail(key: Tensor, past: int, ctx: Context) -> Tensor:
    """Positions of the keys that aren't in the cache yet."""
    if ctx.kv_positions is not None:
        return key[..., past:]
    return counted(ctx.store, past, key.shape[-1], key.device)


def _projection(projection: Any, sizes: Sizes) -> Projection:
    if isinstance(projection, Projection):
        return projection
    recipe = make(projection) if isinstance(projection, str) else projection
    if not isinstance(recipe, Recipe):
        raise InputError(
            f"Attention(projection={projection!r}): that is {_kind(recipe)}, no projection; "
            'expected one such as "mha" or "mfa" (see foveate methods).'
        )
    return recipe.build(sizes)


def _attention(attention: Any, projection: Projection, dim: int, layer: int) -> Method:
    method = make(attention) if isinstance(attention, str) else attention
    if isinstance(method, AttentionRecipe):
        method = method.build(heads_of(projection, dim, layer))
    elif isinstance(method, Method) and type(method).placed is not Method.placed:
        method = method.placed(heads_of(projection, dim, layer))
    if not isinstance(method, Method):
        raise InputError(
            f"Attention(attention={attention!r}): that is {_kind(method)}, no attention; expected "
            'one such as "full" or "sink-window" (see foveate methods).'
        )
    return method


def _kind(thing: Any) -> str:
    if isinstance(thing, Recipe):
        return "a projection"
    return "an attention" if isinstance(thing, Method) else f"a {type(thing).__name__}"
