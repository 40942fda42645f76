"""Tensor attention in a layer: the further keys and values, and decoding.

Alman and Song 2024, arXiv 2310.04064: five maps W_Q, W_K1, W_K2, W_V1, W_V2 and W_O. The layer's
projection gives q, k1, v1 and makes y; the others are maps of the layer's input here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.tensor_attention import features
from foveate.methods.tensor_attention.method import (
    Form,
    approximable,
    bound,
    check,
    tensor_attention,
)
from foveate.ops import AttentionOutput, with_sinks
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import AttentionRecipe, Heads
from foveate.parts.cache import Field
from foveate.parts.context import Context
from foveate.parts.kv_cache import Entries, token_field
from foveate.parts.precision import uncast
from foveate.parts.projection import positive, split_heads
from foveate.parts.state import State, Stateful
from foveate.parts.token_state import TokenState

SCALES = ("1/d", "1/sqrt(d)")


@dataclass(frozen=True)
class TensorAttention(AttentionRecipe):
    """Each query attends to pairs of tokens (or larger tuples); values multiply elementwise.

    Any mask when exact, with O(n^3) work and O(n d) memory; causal and full ones when approximated
    by features. A tuple is seen if each of its tokens is.

    Decoding keeps all keys and values and is exact; with form="features" and a radius (and a
    causal mask) it keeps sums alone, of r (Dv + 1) numbers for each factor and head.

    Attributes:
        order: k, 3 for pairs.
        scale: factor on the logits: "1/d" (the paper), "1/sqrt(d)", which keeps the logits of
            independent unit entries at unit variance, or a number.
        tied: all keys and all values are the projection's; no further parameters, and half the
            exact work for pairs.
        rotary: whether q and k come as RoPE turned them; else as they were before. A product of
            three turned vectors doesn't depend on distances alone.
        form, exact_up_to, degree, tolerance, polynomial, radius, max_rank: see `Form`.

    Raises:
        InputError: a field that doesn't fit.
    """

    order: int = 3
    scale: str | float = "1/d"
    tied: bool = False
    rotary: bool = False
    form: str = "auto"
    exact_up_to: int = 512
    degree: int | None = None
    tolerance: float = 1e-3
    polynomial: str = "taylor"
    radius: float | None = None
    max_rank: int = 8192

    def __post_init__(self) -> None:
        whole("TensorAttention", "order", self.order, least=2)
        if isinstance(self.scale, str):
            if self.scale not in SCALES:
                raise InputError(
                    f"TensorAttention(scale={self.scale!r}): expected {', '.join(SCALES)} or a "
                    "number."
                )
        else:
            positive("TensorAttention", scale=self.scale)
        self.how  # noqa: B018 - refuses fields that don't fit

    @property
    def how(self) -> Form:
        """Which form runs."""
        return Form(
            self.form, self.exact_up_to, self.degree, self.tolerance, self.polynomial, self.radius,
            self.max_rank,
        )  # fmt: skip

    def factor(self, width: int) -> float:
        """The scale for heads of this width."""
        if isinstance(self.scale, str):
            return 1 / width if self.scale == "1/d" else width**-0.5
        return self.scale

    @override
    def build(self, heads: Heads) -> TensorLayer:
        return TensorLayer(self, heads)


class TensorLayer(Stateful, nn.Module):
    """Tensor attention with its further keys and values.

    Args:
        recipe: the hyper-parameters.
        heads: sizes of the layer.
    """

    def __init__(self, recipe: TensorAttention, heads: Heads) -> None:
        super().__init__()
        self.recipe, self.heads = recipe, heads
        self.more = recipe.order - 2
        if recipe.form != "exact" and recipe.radius is not None:
            p = recipe.how.chosen(0.0, heads.key_dim)  # refused here, not when a text is long
            recipe.how.precision(p, torch.float32)
        own = 0 if recipe.tied else self.more
        self.k_proj = _maps(own, heads.dim, heads.kv * heads.key_dim)
        self.v_proj = _maps(own, heads.dim, heads.kv * heads.value_dim)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return repr(self.recipe)

    def factors(self, k: Tensor, v: Tensor, ctx: Context) -> tuple[list[Tensor], list[Tensor]]:
        """All keys and all values, from the first ones and the layer's input.

        Raises:
            InputError: the input of these tokens isn't known.
        """
        if self.recipe.tied or not self.more:
            return [k] * (self.more + 1), [v] * (self.more + 1)
        x = ctx.hidden
        if x is None or x.shape[1] != k.shape[2]:
            raise InputError(
                "tensor-attention makes further keys and values of the layer's input, which isn't "
                "known here for all keys; run it in foveate.Attention as self-attention (without "
                "x_kv), or with tied=True."
            )
        heads = self.heads.kv
        return (
            [k, *(split_heads(made(x), heads) for made in self.k_proj)],
            [v, *(split_heads(made(x), heads) for made in self.v_proj)],
        )

    def _unturned(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        if self.recipe.rotary:
            return q, k
        return (
            q if ctx.raw_query is None else ctx.raw_query,
            k if ctx.raw_key is None else ctx.raw_key,
        )

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        return self.recipe.factor(self.heads.key_dim)

    @override
    def full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
        q, k = self._unturned(q, k, ctx)
        keys, values = self.factors(k, v, ctx)
        own = replace(ctx, scale=None)
        return tensor_attention(q, keys, values, scale=self.scale, form=self.recipe.how, ctx=own)

    @override
    def new_state(self) -> State:
        if self.recipe.form == "features" and self.recipe.radius is not None:
            return SumState(self.recipe, self.heads)
        return TupleState(self.recipe, self.heads)

    @override
    def step(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State) -> AttentionOutput:
        q, k = self._unturned(q, k, ctx)
        keys, values = self.factors(k, v, ctx)
        if isinstance(state, SumState):
            return self._summed(q, keys, values, ctx, state)
        assert isinstance(state, TupleState)
        first = not len(state)
        held = state.append(_entries(keys, values, state.factors))
        keys, values = _tuples(held, self.more + 1)
        form = self.recipe.how
        if not first:  # the prompt may be approximated; new tokens see all of the past exactly
            form = replace(form, form="exact")
        own = replace(ctx, scale=None)
        return tensor_attention(q, keys, values, scale=self.scale, form=form, ctx=own)

    def _summed(
        self, q: Tensor, keys: list[Tensor], values: list[Tensor], ctx: Context, state: SumState
    ) -> AttentionOutput:
        check(q, keys, values, ctx)
        n = len(state) + q.shape[2]
        stand_in = q.new_empty(1).expand(*keys[0].shape[:2], n, q.shape[3])
        tokens = approximable(q, stand_in, ctx)
        if not tokens.causal:
            raise InputError("tensor-attention decodes with a causal mask only; give causal().")
        wide = torch.promote_types(q.dtype, torch.float32)
        qs, ks, vs = q.to(wide), [x.to(wide) for x in keys], [x.to(wide) for x in values]
        measured = bound(qs, ks, self.scale, ctx.real, ctx.real)
        ctx.aux["logit_bound"] = qs.new_tensor(measured)
        p = self.recipe.how.chosen(measured, q.shape[3])
        exact_enough = self.recipe.how.precision(p, wide)
        qs = qs.to(exact_enough)
        ks, vs = ([x.to(exact_enough) for x in xs] for xs in (ks, vs))
        real = None if ctx.real is None or bool(ctx.real.all()) else ctx.real
        with uncast(q):
            found, sums = features.causal_scan(qs, ks, vs, p, self.scale, real, state.sums)
        state.take(sums, q.shape[2])
        result = AttentionOutput(found.out.to(q.dtype), found.lse.to(wide))
        return result if ctx.sink_logits is None else with_sinks(result, ctx.sink_logits)


class TupleState(TokenState):
    """All keys and values of every token; a tied layer's once.

    Args:
        recipe: the hyper-parameters.
        heads: sizes of the layer.
    """

    def __init__(self, recipe: TensorAttention, heads: Heads) -> None:
        self.factors = 1 if recipe.tied else recipe.order - 1
        names = range(1, self.factors + 1)
        super().__init__(
            [token_field(f"k{s}", heads.kv, heads.key_dim) for s in names]
            + [token_field(f"v{s}", heads.kv, heads.value_dim) for s in names]
        )


class SumState(State):
    """The sums U^T [V, 1] of each factor, whatever the length.

    Args:
        recipe: the hyper-parameters, with a radius, so that the degree is fixed.
        heads: sizes of the layer.
    """

    def __init__(self, recipe: TensorAttention, heads: Heads) -> None:
        assert recipe.radius is not None
        degree = recipe.how.chosen(0.0, heads.key_dim).degree
        shape = (heads.kv, features.rank(heads.key_dim, degree), heads.value_dim + 1)
        super().__init__([Field(f"s{s}", "sequence", shape, 1) for s in range(1, recipe.order)])

    @property
    def sums(self) -> tuple[Tensor, ...] | None:
        """Of the tokens so far; None before the first."""
        return tuple(self.held.values()) or None

    def take(self, sums: tuple[Tensor, ...], new: int) -> None:
        """Hold these, over `new` more tokens."""
        self.held = {field.name: x for field, x in zip(self.fields, sums)}
        self.length += new


def _maps(count: int, dim: int, width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(dim, width, bias=False) for _ in range(count))


def _entries(keys: list[Tensor], values: list[Tensor], factors: int) -> Entries:
    named = {f"k{s + 1}": keys[s] for s in range(factors)}
    return named | {f"v{s + 1}": values[s] for s in range(factors)}


def _tuples(held: Entries, factors: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of all factors, from what is held of each token."""
    keys = [held.get(f"k{s}", held["k1"]) for s in range(1, factors + 1)]
    return keys, [held.get(f"v{s}", held["v1"]) for s in range(1, factors + 1)]
