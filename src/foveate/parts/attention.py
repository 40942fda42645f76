"""Attention and Pattern: the contracts that methods on q, k, v fulfil; recipes to build them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor

from foveate.ops import AttentionOutput, Layout, Mask, attention, window
from foveate.parts.context import Context

TILE = 64
EVERYTHING = window(-1, -1)
T = TypeVar("T")


class Attention(ABC):
    """Takes q, k, v and a context and returns an output.

    A dataclass whose fields are its hyper-parameters; an `nn.Module` as well where it has
    parameters or persistent state. `exact` says that it keeps everything that the mask allows,
    `wants_query_rope` that it looks at queries as they were before their rotation, `rotary` that
    queries and keys may be rotated to their positions at all, `evicts` that it drops keys from the
    cache in its context, `sized` that it has weights for the layer's own heads, and so can't run on
    the latent that a projection decodes on.
    """

    exact: ClassVar[bool] = False
    rotary: ClassVar[bool] = True
    wants_query_rope: ClassVar[bool] = False
    evicts: ClassVar[bool] = False
    sized: ClassVar[bool] = False

    def split(self, layer: int) -> list[tuple[tuple[int, ...] | None, Attention]] | None:
        """(heads, attention) of each group of a layer's heads; None if all run the same.

        Heads None are all of them. Whoever runs a model's layers may run these in its place.
        """
        return None

    @abstractmethod
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Attend.

        Args:
            q: (B, Hq, Lq, D).
            k: (B, Hkv, Lkv, D), Hq a multiple of Hkv.
            v: (B, Hkv, Lkv, Dv).
            ctx: mask, positions and whatever else is known; None is an empty one.

        Returns:
            out (B, Hq, Lq, Dv) and lse (B, Hq, Lq); a formula that has no log-sum-exp says NaN
            there, so that a merge by it shows.
        """

    def alone(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Attention, Tensor, Tensor]:
        """What a call computes, as an attention, queries and keys that need no other layer.

        For whoever repeats one layer's call, such as a check: mostly the call as it is.
        """
        return self, q, k

    def placed(self, heads: Heads) -> Attention:
        """What a layer of these sizes runs in its place; mostly the same object.

        For an attention that declares a state of these sizes, or holds another that is built.
        """
        return self


@dataclass(frozen=True)
class Heads:
    """The sizes of a layer's heads, for an attention that has parameters of its own.

    Attributes:
        dim: width of the layer's input.
        query: Hq.
        kv: Hkv, a divisor of Hq.
        key_dim: D.
        value_dim: Dv.
        layer: index of the layer, from 0.
    """

    dim: int
    query: int
    kv: int
    key_dim: int
    value_dim: int
    layer: int = 0


class AttentionRecipe(ABC):
    """An attention's hyper-parameters, where its parameters' shapes depend on the layer.

    A frozen dataclass, made by `foveate.methods.make`; `foveate.Attention` builds it.
    """

    @abstractmethod
    def build(self, heads: Heads) -> Attention:
        """The attention for these sizes, an nn.Module as well, with fresh weights.

        Raises:
            InputError: the hyper-parameters don't fit the sizes.
        """


class Pattern(Attention):
    """An attention that is told whole by the layout it returns, always within the mask."""

    @abstractmethod
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        """Which keys each query sees, within `ctx.mask`; shapes as in `__call__`."""

    def rule(self, ctx: Context) -> Mask | None:
        """The mask that says the same as the layout, where positions alone decide; else None.

        With it a compiled model holds the pattern as one call, its layout resolved when it runs.
        """
        return None

    def is_dense(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        """Whether this call keeps all that the mask allows, so that no choice is to be made."""
        return False

    @classmethod
    def for_heads(cls, methods: Sequence[Self]) -> Pattern | None:
        """One pattern that runs a method for each query head; None where they can't be one.

        For whoever has heads with numbers of their own: choosing for all at once costs less.
        """
        return None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Build the layout, then run the core op over it; `ctx.stats` hears of both times.

        While torch.compile traces, nothing is timed.
        """
        ctx = Context() if ctx is None else ctx
        if not q.shape[0]:  # nothing to choose for; the op checks the rest
            _tell(ctx, ctx.mask, None)
            return attention(q, k, v, **ctx.options)
        plain = ctx.q_positions is None and ctx.kv_positions is None
        dense = self.is_dense(q, k, ctx)
        if torch.compiler.is_compiling() and plain and not dense:
            rule = self.rule(ctx)
            if rule is not None:
                _tell(ctx, rule, None)
                return attention(q, k, v, rule, **ctx.options)
        start = clock(q, ctx)
        layout = None
        if not dense:
            with torch.no_grad():
                layout = self.layout(q, k, v, ctx)
        elif not plain:
            layout = mask_layout(ctx.mask, q, k, ctx)
        built = clock(q, ctx)
        mask = ctx.mask if layout is None else None
        _tell(ctx, mask, layout)
        result = attention(q, k, v, mask, layout=layout, **ctx.options)
        if ctx.stats is not None and not torch.compiler.is_compiling():
            done = clock(q, ctx)
            ctx.stats(
                layer=ctx.layer,
                layout=mask_layout(ctx.mask, q, k, ctx) if layout is None else layout,
                build_seconds=built - start,
                attend_seconds=done - built,
            )
        return result


def _tell(ctx: Context, mask: Mask | None, layout: Layout | None) -> None:
    if ctx.again is not None:
        ctx.again.ran(mask, layout)


def mask_layout(
    mask: Mask | None, q: Tensor, k: Tensor, ctx: Context, tile: int | tuple[int, int] = TILE
) -> Layout:
    """The layout of a mask for this call's lengths, positions and device.

    The core op keeps the layouts of masks that lengths alone decide; the others (with positions or
    tables) are kept in `ctx.store`, so that the layers of one forward build them once.
    """
    mask = EVERYTHING if mask is None else mask
    lengths = (q.shape[2], k.shape[2])
    if ctx.q_positions is None and ctx.kv_positions is None and not mask.tensors:
        return mask.layout(*lengths, tile, device=q.device)

    def build() -> Layout:
        return mask.layout(
            *lengths,
            tile,
            q_positions=ctx.q_positions,
            kv_positions=ctx.kv_positions,
            device=q.device,
        )

    return remember(ctx, (mask_layout, mask, lengths, tile, q.device), build)


def remember(ctx: Context, key: Hashable, build: Callable[[], T]) -> T:
    """What `build` returns, kept in `ctx.store` under `key` and the positions of `ctx`."""
    kept = ctx.store.setdefault(key, [])
    for q_positions, kv_positions, found in kept:
        if _same(q_positions, ctx.q_positions) and _same(kv_positions, ctx.kv_positions):
            return found
    built = build()
    kept.append((ctx.q_positions, ctx.kv_positions, built))
    return built


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    if one is two:
        return True
    return one is not None and two is not None and torch.equal(one, two)


def clock(q: Tensor, ctx: Context) -> float:
    """Seconds; 0 where nobody listens."""
    if ctx.stats is None or torch.compiler.is_compiling():
        return 0.0
    if q.is_cuda:
        torch.cuda.synchronize(q.device)
    return perf_counter()
