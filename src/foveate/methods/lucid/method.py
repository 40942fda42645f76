"""LUCID: any attention, over values from which similar earlier keys' part is erased first.

    O = softmax(Q K^T / sqrt(d) + mask) Y,    M Y = V,
    M_ij = exp(kbar_i . kbar_j / sqrt(d) - sqrt(d)) for j < i,  M_ii = 1,   kbar = sqrt(d) k / ||k||

Duvvuri et al. 2026, "LUCID: Attention with Preconditioned Representations", arXiv 2602.10410. Y is
what a delta rule writes in the feature space phi of the exponential kernel, "erase, then write":

    S_t = S_{t-1} - (S_{t-1} phi(k_t) - v_t) phi(k_t)^T

(DeltaNet is the same with phi the identity). The weights themselves are the inner attention's: q
and k go to it as they are, with no norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.lucid.solve import normalised, solve
from foveate.methods.lucid.state import LucidState
from foveate.methods.lucid.triangle import triangle
from foveate.methods.naming import make
from foveate.ops import AttentionOutput
from foveate.ops.check import check_tensors
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention, AttentionRecipe, Heads
from foveate.parts.context import Context
from foveate.parts.projection import positive
from foveate.parts.state import State, Stateful


@dataclass(frozen=True)
class Lucid(Attention):
    """Softmax attention, or any other of the catalog, over decorrelated values Y.

    Causal only. Y belongs to a key/value head, so query heads of a group share it; M is masked by
    `ctx.mask` (padding, packed documents, a model's own window), not by what the inner attention
    selects. The keys are those that attention sees, after RoPE. Solved in fp32 or wider.

    In a layer of `foveate.Attention` decoding keeps y in place of v, as many bytes, and a new
    token costs one more pass over both. Without such a state (`foveate.use`, whose models cache v)
    Y is made anew in every call.

    Attributes:
        inner: what attends over Y: a key of the catalog with its hyper-parameters, such as
            "sink-window(window=256)", an attention, or a recipe of one.
        block: T, rows that are solved at a time; changes nothing but speed and memory.
        eps: added to the mean square of a key, as in RMSNorm; the diagonal of M is 1 all the same.
        fp32_state: keep y in fp32 where keys are in less; better beyond some 32,000 tokens, since
            errors grow with the condition of M.

    Raises:
        InputError: block below 1, eps not above 0, or an inner method that is no attention.
    """

    inner: str | Attention | AttentionRecipe = "full"
    block: int = 256
    eps: float = 1e-6
    fp32_state: bool = False

    def __post_init__(self) -> None:
        whole("Lucid", "block", self.block, least=1)
        positive("Lucid", eps=self.eps)
        if not isinstance(self._made, Attention | AttentionRecipe):
            raise InputError(
                f"Lucid(inner={self.inner!r}): that is no attention on q, k and v; expected one "
                'such as "full" or "sink-window(window=256)" (see foveate methods).'
            )

    @cached_property
    def _made(self) -> Attention | AttentionRecipe:
        return make(self.inner) if isinstance(self.inner, str) else self.inner

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Shapes as in `Attention`; the lse is the inner attention's."""
        if isinstance(self._made, AttentionRecipe):
            raise InputError(
                f"lucid(inner={self.inner!r}): the inner attention has parameters for a layer's "
                "heads; build it by foveate.Attention(dim, num_heads, attention=...)."
            )
        return self.attend(q, k, v, Context() if ctx is None else ctx, self._made)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, inner: Attention
    ) -> AttentionOutput:
        """All tokens at once, by an inner attention that is built."""
        check_tensors(q, k, v)
        return inner(q, k, self.prepared(k, v, ctx), ctx)

    def prepared(self, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        """Y of all tokens, in the dtype of v.

        Args:
            k: (B, Hkv, L, D), as attention sees them.
            v: (B, Hkv, L, Dv).
            ctx: mask and positions of keys.

        Returns:
            (B, Hkv, L, Dv); differentiable once.

        Raises:
            InputError: the mask isn't causal, or positions don't rise.
        """
        kbar = normalised(k, self.eps)
        wide = v.to(kbar.dtype)
        where = triangle(k, 0, self.block, ctx)
        return solve(kbar, wide, wide[:, :, :0], where).to(v.dtype)

    @override
    def placed(self, heads: Heads) -> LucidLayer:
        made = self._made
        if isinstance(made, AttentionRecipe):
            return LucidLayer(self, made.build(heads), heads)
        return LucidLayer(self, made.placed(heads), heads)


class LucidLayer(Stateful, nn.Module):
    """LUCID in a layer: its inner attention built, and a state of k and y for decoding.

    Args:
        lucid: the hyper-parameters.
        inner: what attends.
        heads: sizes of the layer.
    """

    def __init__(self, lucid: Lucid, inner: Attention, heads: Heads) -> None:
        super().__init__()
        self.lucid, self.inner, self.heads = lucid, inner, heads

    @override
    def full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
        return self.lucid.attend(q, k, v, ctx, self.inner)

    @override
    def recalled(self, x: Tensor, x_kv: Tensor, state: State) -> Tensor:
        """The new tokens.

        Raises:
            InputError: the inner attention makes earlier tokens' keys and values anew, for which no
                y is kept.
        """
        assert isinstance(state, LucidState)
        if state.inner is not None:
            assert isinstance(self.inner, Stateful)
            if self.inner.recalled(x, x_kv, state.inner) is not x_kv:
                raise InputError(
                    f"lucid(inner={self.lucid.inner!r}): the inner attention makes keys and values "
                    "of its memory anew, but prepared values are only kept for tokens; take an "
                    "inner attention without such a memory."
                )
        return x_kv

    @override
    def new_state(self) -> LucidState:
        inner = self.inner.new_state() if isinstance(self.inner, Stateful) else None
        return LucidState(self.heads, inner)

    @override
    def step(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State) -> AttentionOutput:
        """The new tokens' y is solved for among them and against all before, then kept."""
        assert isinstance(state, LucidState)
        check_tensors(q, k, v)
        held, past = state.entries, len(state)
        kbar, done = normalised(k, self.lucid.eps), v[:, :, :0]
        if past:
            kbar, done = torch.cat((normalised(held["k"], self.lucid.eps), kbar), 2), held["y"]
        where = triangle(kbar, past, self.lucid.block, ctx)
        y = solve(kbar, v.to(kbar.dtype), done.to(kbar.dtype), where)
        kept = state.append({"k": k, "y": y if self.lucid.fp32_state else y.to(v.dtype)})
        alone = replace(ctx, cache=None)
        if state.inner is not None:
            assert isinstance(self.inner, Stateful)
            return self.inner.step(q, k, y.to(v.dtype), alone, state.inner)
        return self.inner(q, kept["k"], kept["y"].to(v.dtype), alone)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return repr(self.lucid)
