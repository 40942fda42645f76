"""EchoAtt: layers that copy the attention map of an earlier layer and apply it to their own values.

    leader    A = softmax(Q K^T / sqrt(d) + mask),  o = A V
    follower  o_j = A_leader V_j

Rajabzadeh et al. 2024, "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language
Models", arXiv 2409.14595, section 2. `choice` says which layers follow, `maps` how a map is handed
on, `values` what a follower's projection loses; `foveate.models.echo` builds and trains a student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.echoatt.maps import Stored, from_stats, stored
from foveate.methods.naming import make
from foveate.ops import AttentionOutput, Layout
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention, AttentionRecipe, Pattern
from foveate.parts.context import Context
from foveate.parts.fitting import Artefact, missing
from foveate.parts.state import Stateful

MODES = ("auto", "store", "recompute", "stats")


@dataclass(frozen=True)
class EchoAtt(Attention):
    """Followers copy the map of their leader, in training, prefill and decoding.

    In a model that is built with it, followers have the projection "echoatt-values", which has no
    queries and keys and caches values alone. In a trained model (`foveate.use`) they keep theirs,
    unused: the same outputs, and what sharing costs in quality before anything is trained.

    A leader leaves its map in `ctx.store`, so the layers of a forward must share one, as those of
    foveate's models and of a model in use do.

    Attributes:
        followers: indices of the layers that copy, each from the nearest earlier layer that isn't
            listed; or pairs (layer, leader) where that isn't so. None: chosen by `foveate fit`.
        mode: how a map is handed on, "store", "recompute" or "stats" (see `maps`); "auto" stores
            single rows (decoding) in fp32, and wherever weights are dropped; else it recomputes.
        inner: what leaders run: a key of the catalog with its hyper-parameters, or an attention.
        share: share of the layers that a fit lets follow.
        block: k of a fit, layers in a block with their leader; None takes the layers most alike.

    Raises:
        InputError: layers that can't follow, an unknown mode, or an inner method that has weights
            or keeps a state of its own.
    """

    followers: tuple[int | tuple[int, int], ...] | None = None
    mode: str = "auto"
    inner: str | Attention = "full"
    share: float = 0.33
    block: int | None = None
    fitter: ClassVar[str] = "foveate.methods.echoatt.fit.fit"
    leaders: dict[int, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"EchoAtt(mode={self.mode!r}) is unknown; {nearest(self.mode, MODES)}")
        if not 0 < self.share < 1:
            raise InputError(f"EchoAtt(share={self.share!r}): expected more than 0, less than 1.")
        if self.block is not None:
            whole("EchoAtt", "block", self.block, least=2)
        if self.followers is not None:
            given = tuple(tuple(f) if isinstance(f, list) else f for f in self.followers)
            object.__setattr__(self, "followers", given)
            object.__setattr__(self, "leaders", leader_map(given))
        inner = self._inner
        if isinstance(inner, AttentionRecipe | Stateful) or not isinstance(inner, Attention):
            raise InputError(
                f"EchoAtt(inner={self.inner!r}): expected an attention without weights or a state "
                'of its own, such as "full" or "sink-window(window=256)".'
            )
        if inner.evicts or inner.wants_query_rope or type(inner).placed is not Attention.placed:
            raise InputError(
                f"EchoAtt(inner={self.inner!r}): it changes its layer's cache or looks at more "
                "than queries and keys, which a follower doesn't have."
            )
        if self.mode in ("store", "stats") and not inner.exact:
            raise InputError(
                f"EchoAtt(mode={self.mode!r}, inner={self.inner!r}): a map with tiles left out is "
                'handed on by mode="recompute".'
            )

    @cached_property
    def _inner(self) -> Any:
        return make(self.inner) if isinstance(self.inner, str) else self.inner

    # -- fitting ---------------------------------------------------------------------------------
    @property
    def needs_fit(self) -> bool:
        """Whether followers are still to be chosen."""
        return self.followers is None

    def with_artefact(self, artefact: Artefact) -> EchoAtt:
        """The same with the followers that a fit chose."""
        return replace(self, followers=tuple(artefact.facts["followers"]))

    # -- attending -------------------------------------------------------------------------------
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Shapes as in `Attention`; of a follower only v is read, the lse is its leader's.

        Raises:
            InputError: the leader hasn't run in this forward, or its heads don't fit.
        """
        ctx = Context() if ctx is None else ctx
        if self.followers is None:
            raise InputError(missing("echoatt", "followers", "echoatt(followers=[...])"))
        leader = self.leaders.get(ctx.layer)
        if leader is not None:
            return self._found(leader, v, ctx).apply(v, ctx)
        if not q.shape[3]:
            raise InputError(
                f"EchoAtt: layer {ctx.layer} has no queries and keys, but it is none of the "
                f"followers {self.followers}; list it, or give it another projection."
            )
        if ctx.layer not in self.leaders.values():
            alone: AttentionOutput = self._inner(q, k, v, ctx)
            return alone
        found, out = self._lead(q, k, v, ctx)
        ctx.store[(EchoAtt, self, ctx.layer)] = found
        return out

    @override
    def alone(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Attention, Tensor, Tensor]:
        """The inner attention; a follower's with its leader's queries and keys."""
        leader = self.leaders.get(ctx.layer)
        found = None if leader is None else ctx.store.get((EchoAtt, self, leader))
        return (self._inner, q, k) if found is None else (self._inner, found.q, found.k)

    def _lead(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> tuple[Map, AttentionOutput]:
        mode = self._mode(q, ctx)
        inner = self._inner
        # A context that held the store in which this lies would keep itself alive.
        own = replace(ctx, store={}, aux={}, stats=None, cache=None)
        if mode == "store":
            held = stored(q, k, ctx)
            out = AttentionOutput(held.apply(v), held.lse)
            return Map(q, k, own, inner, out.lse, held), out
        if isinstance(inner, Pattern):
            inner = Seen(inner)
        result = inner(q, k, v, ctx)
        return Map(q, k, own, inner, result.lse, mode=mode), result

    def _mode(self, q: Tensor, ctx: Context) -> str:
        if self.mode != "auto":
            if ctx.dropout and self.mode != "store":
                raise InputError(
                    f"EchoAtt(mode={self.mode!r}): weights are dropped once, in the leader, and "
                    'only mode="store" hands on what is left; use it, or no dropout.'
                )
            return self.mode
        if ctx.dropout and not self._inner.exact:
            raise InputError(
                f"EchoAtt(inner={self.inner!r}): a follower would drop other weights than its "
                'leader; use inner="full", or no dropout.'
            )
        # In half precision the engines read keys as they are, and this would widen them first.
        row = q.shape[2] == 1 and self._inner.exact and q.dtype.itemsize >= 4
        return "store" if row or ctx.dropout else "recompute"

    def _found(self, leader: int, v: Tensor, ctx: Context) -> Map:
        found = ctx.store.get((EchoAtt, self, leader))
        if found is None:
            raise InputError(
                f"EchoAtt: layer {ctx.layer} copies the map of layer {leader}, which hasn't run in "
                "this forward; both layers need the same attention, and one context (its store) "
                "for all layers of a forward."
            )
        q, k = found.q, found.k
        if len(q) != len(v) or k.shape[2] != v.shape[2] or q.shape[1] % v.shape[1]:
            raise InputError(
                f"EchoAtt: layer {leader} has a map of {q.shape[1]} heads on {k.shape[2]} keys in "
                f"{len(q)} rows; layer {ctx.layer} has {v.shape[1]} value heads on {v.shape[2]} "
                f"keys in {len(v)}."
            )
        assert isinstance(found, Map)
        return found


@dataclass(frozen=True)
class Map:
    """What a leader leaves: enough to attend as it did, to other values.

    Attributes:
        q, k: (B, Hq, Lq, D), (B, Hkv, Lkv, D), as its attention saw them.
        ctx: its context.
        inner: what it ran.
        lse: (B, Hq, Lq).
        held: A, where it is stored.
        mode: how it is applied, where it isn't.
        graph: whether gradients reach the leader.
    """

    q: Tensor
    k: Tensor
    ctx: Context
    inner: Attention
    lse: Tensor
    held: Stored | None = None
    mode: str = "store"
    graph: bool = field(default_factory=torch.is_grad_enabled)

    def apply(self, v: Tensor, ctx: Context) -> AttentionOutput:
        """A v for a follower's values (B, Hkv', Lkv, Dv); ctx is the follower's, for its stats."""
        if torch.is_grad_enabled() and not self.graph:
            raise InputError(
                f"EchoAtt: layer {ctx.layer} has gradients, but its leader ran without: gradients "
                "would end there. With gradient checkpointing use use_reentrant=False."
            )
        if self.held is not None:
            return AttentionOutput(self.held.apply(v), self.lse)
        own = replace(self.ctx, layer=ctx.layer, stats=ctx.stats, aux=ctx.aux, store=ctx.store)
        if self.mode == "stats":
            return from_stats(self.q, self.k, v, self.lse, own)
        return self._again(v, own)

    def _again(self, v: Tensor, ctx: Context) -> AttentionOutput:
        """The same attention; heads of values must be heads of keys there."""
        q, k, heads = self.q, self.k, v.shape[1]
        if heads < k.shape[1]:
            v = v.repeat_interleave(k.shape[1] // heads, 1)
        elif heads > k.shape[1]:
            k = k.repeat_interleave(heads // k.shape[1], 1)
        return self.inner(q, k, v, ctx)


class Seen(Pattern):
    """A pattern that chooses once: its layout is kept for the followers.

    Args:
        inner: that chooses.
    """

    def __init__(self, inner: Pattern) -> None:
        self.inner = inner
        self._layout: Layout | None = None
        self._heads = 0

    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        """The inner pattern's, of the first call."""
        if self._layout is None or self._heads != k.shape[1]:
            self._layout, self._heads = self.inner.layout(q, k, v, ctx), k.shape[1]
        return self._layout

    def rule(self, ctx: Context) -> Any:
        """As the inner pattern."""
        return self.inner.rule(ctx)

    def is_dense(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        """As the inner pattern."""
        return self.inner.is_dense(q, k, ctx)


def leader_map(followers: Sequence[int | tuple[int, int]]) -> dict[int, int]:
    """{follower: leader} of a list as `EchoAtt.followers`.

    Raises:
        InputError: a layer twice, one that has no earlier leader, or whose leader follows.
    """
    layers = [f[0] if isinstance(f, tuple) else f for f in followers]
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in layers):
        raise InputError(f"EchoAtt(followers={tuple(followers)!r}): expected indices of layers.")
    if len(set(layers)) < len(layers):
        raise InputError(f"EchoAtt(followers={tuple(followers)!r}): a layer stands there twice.")
    found: dict[int, int] = {}
    for follower, layer in zip(followers, layers):
        if isinstance(follower, tuple):
            leader = follower[1]
        else:
            leader = next((n for n in range(layer - 1, -1, -1) if n not in layers), -1)
        if not 0 <= leader < layer or leader in layers:
            raise InputError(
                f"EchoAtt(followers={tuple(followers)!r}): layer {layer} has no earlier layer that "
                "computes a map; layer 0 can't follow, and a leader doesn't follow itself."
            )
        found[layer] = leader
    return found
