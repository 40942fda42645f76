"""The Grassmann mixer: pairs of a token and earlier ones, as planes, gated into the token.

    1. z_t   = W_red h_t + b_red                                          (r)
    2. phat  = pl(z_t, z_{t-d}) / max(|.|, eps)   for each offset d       (c = r (r - 1) / 2)
               (0 where the two are parallel but for rounding: they span no plane)
    3. g_t   = W_plu mean_d phat + b_plu, over the valid d; 0 if none     (dim)
    4. alpha = sigmoid(W_gate [h_t ; g_t] + b_gate)
    5. m_t   = alpha h_t + (1 - alpha) g_t
    6. y     = Dropout(LayerNorm(m))

W_plu is linear, so the mean over offsets comes before it: one product instead of one for each
offset. A pair (t, t - d) is delivered to the *later* token; to decode, the last max(d) vectors z
are all that is kept. With a mask that isn't causal the pairs (t, t + d) count too.

Wiring A (the block adds no residual, the gate carries h): u = y, out = LN(u + FFN(u)).
Wiring B: out1 = h + y with y of LN(h), out = out1 + FFN(LN(out1)).

Source: "Attention Is Not What You Need", arXiv 2512.19428, sections 3 and 4. Its pairs are written
(t, t + d); for a language model they must be read as above. All offsets in each layer are those of
its WikiText-2 models as far as is known; `offsets` also takes one list for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.methods.grassmann.planes import mean_features, rounding_of
from foveate.ops.errors import InputError
from foveate.ops.masks.base import positions
from foveate.ops.masks.checks import whole
from foveate.parts.cache import Field
from foveate.parts.context import Context
from foveate.parts.mixer import Mixer, MixerRecipe, MixerSizes, mixed_tokens, pairs_seen
from foveate.parts.state import State

Offsets = Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Grassmann(MixerRecipe):
    """Tokens mixed by normalised Pluecker coordinates of pairs; see the module's text.

    Attributes:
        rank: r, to which tokens are reduced; 2 or more.
        offsets: distances of pairs, 1 or more, different; or a list of them for each layer.
        wiring: "A" (post-norm, no residual around the mixer) or "B" (pre-norm, with one).
        dropout: of the mixer's output in training.
        heads: groups that the c pairs are split into, each with a W_plu of its own onto dim / heads
            outputs (the paper's heads for sentence pairs).
        window: pairs lie inside windows of so many tokens; None has no windows.
        stride: between the windows' beginnings; None is `window`.
        eps: least length of p.
        smooth: divide by sqrt(|p|^2 + eps^2) instead of max(|p|, eps), for a bounded gradient.

    Raises:
        InputError: a number out of its range, offsets that aren't different, or an unknown wiring.
    """

    rank: int = 32
    offsets: Offsets = (1, 2, 4, 8, 12, 16)
    wiring: str = "A"
    dropout: float = 0.1
    heads: int = 1
    window: int | None = None
    stride: int | None = None
    eps: float = 1e-8
    smooth: bool = False

    def __post_init__(self) -> None:
        whole("Grassmann", "rank", self.rank, least=2)
        whole("Grassmann", "heads", self.heads, least=1)
        if self.wiring not in ("A", "B"):
            raise InputError(f"Grassmann(wiring={self.wiring!r}): expected 'A' or 'B'.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"Grassmann(dropout={self.dropout!r}): expected 0 up to, not with, 1.")
        if not 0 < self.eps < 1:
            raise InputError(f"Grassmann(eps={self.eps!r}): expected a small number above 0.")
        if self.window is not None:
            whole("Grassmann", "window", self.window, least=2)
        if self.stride is not None:
            whole("Grassmann", "stride", self.stride, least=1)
            if self.window is None or self.stride > self.window:
                raise InputError(
                    f"Grassmann(stride={self.stride}): windows of {self.window} tokens would leave "
                    "some out; give a window at least as long."
                )
        for some in self.schedule():
            if not some or len(set(some)) < len(some):
                raise InputError(
                    f"Grassmann(offsets={self.offsets!r}): expected different distances, one or "
                    "more for each layer."
                )
            for offset in some:
                whole("Grassmann", "an offset", offset, least=1)

    def schedule(self) -> tuple[tuple[int, ...], ...]:
        """The offsets of each layer, or one tuple for all layers."""
        given = tuple(self.offsets)
        if given and all(isinstance(some, list | tuple) for some in given):
            return tuple(tuple(some) for some in given)  # type: ignore[arg-type]
        return (given,)  # type: ignore[return-value]

    def build(self, sizes: MixerSizes) -> GrassmannMixer:
        """The mixer of a layer.

        Raises:
            InputError: no offsets for this layer, or heads that don't divide the width or pairs.
        """
        plan = self.schedule()
        if len(plan) > 1 and sizes.layer >= len(plan):
            raise InputError(
                f"Grassmann(offsets): there are lists for {len(plan)} layers, none for layer "
                f"{sizes.layer} (counted from 0)."
            )
        pairs = self.rank * (self.rank - 1) // 2
        if sizes.dim % self.heads or pairs % self.heads:
            raise InputError(
                f"Grassmann(heads={self.heads}): they divide neither or only one of the width "
                f"{sizes.dim} and the {pairs} pairs of rank {self.rank}."
            )
        return GrassmannMixer(self, sizes.dim, plan[sizes.layer if len(plan) > 1 else 0])


class GrassmannState(State):
    """The last vectors z, a ring; see `State`.

    Args:
        reach: the largest offset.
        rank: r.
    """

    def __init__(self, reach: int, rank: int) -> None:
        super().__init__((Field("z", "ring", (rank,), reach),))
        self.reach = reach

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            InputError: there are fewer, or the ring has lost some that would be needed.
        """
        length = whole("truncate", "length", length, least=0)
        if length > self.length:
            raise InputError(f"truncate({length}): the state holds only {self.length} tokens.")
        kept = self.held["z"].shape[1] if self.held else 0
        if length < self.length and kept < self.length and length:
            raise InputError(
                f"truncate({length}): the ring keeps the last {kept} of {self.length} tokens, and "
                "those before are gone; run the shorter prompt again."
            )
        if not length:
            self.reset()
        elif length < self.length:
            self.held["z"], self.length = self.held["z"][:, :length], length


class GrassmannMixer(Mixer):
    """The mixer of one layer; see the module's text.

    Args:
        recipe: hyper-parameters.
        dim: width.
        offsets: distances of pairs in this layer.
    """

    def __init__(self, recipe: Grassmann, dim: int, offsets: tuple[int, ...]) -> None:
        super().__init__()
        self.recipe, self.dim, self.offsets = recipe, dim, offsets
        self.carries = recipe.wiring == "A"
        pairs = recipe.rank * (recipe.rank - 1) // 2
        self.reduce = nn.Linear(dim, recipe.rank)
        self.plucker = nn.Linear(pairs // recipe.heads, dim)  # W_plu of all heads, by rows
        self.gate = nn.Linear(2 * dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.drop = nn.Dropout(recipe.dropout)

    @property
    def reach(self) -> int:
        """How far back a token looks."""
        return max(self.offsets)

    def new_state(self) -> GrassmannState:
        """An empty ring."""
        return GrassmannState(self.reach, self.recipe.rank)

    def full(self, x: Tensor, ctx: Context) -> Tensor:
        """All tokens at once, x (B, L, dim)."""
        return self._mixed(x, self.geometry(x, self.reduce(x), ctx))

    def step(self, x: Tensor, ctx: Context, state: State) -> Tensor:
        """The next tokens; the ring keeps the last `reach` vectors z."""
        z = self.reduce(x)
        if "z" in state.held:
            z = torch.cat((state.held["z"].to(z.dtype), z), 1)
        g = self.geometry(x, z, ctx, past=len(state))
        state.held["z"] = z[:, -self.reach :]
        state.length += x.shape[1]
        return self._mixed(x, g)

    def geometry(self, x: Tensor, z: Tensor, ctx: Context, past: int = 0) -> Tensor:
        """Mean planes g (B, n, dim) of new tokens x (B, n, dim); z (B, N, r) ends with theirs."""
        start = z.shape[1] - x.shape[1]
        shifts = self._shifts(x, past, ctx)
        valid = torch.stack([self._valid(x, past, d, ctx) for d in shifts])
        count = valid.sum(0)
        wide = torch.promote_types(z.dtype, torch.float32)
        weight = valid.to(wide) / count.clamp_min(1)
        mean = mean_features(
            z.to(wide), start, shifts, weight, self.recipe.eps, self.recipe.smooth,
            rounding_of(z.dtype),
        )  # fmt: skip
        return self._planes(mean.to(x.dtype)) * (count > 0)[..., None]

    def _planes(self, mean: Tensor) -> Tensor:
        """W_plu mean + b_plu, by heads."""
        heads = self.recipe.heads
        if heads == 1:
            return self.plucker(mean)
        weight = self.plucker.weight.unflatten(0, (heads, -1))
        out = torch.einsum("blhc,hdc->blhd", mean.unflatten(-1, (heads, -1)), weight)
        return out.flatten(-2) + self.plucker.bias

    def _shifts(self, x: Tensor, past: int, ctx: Context) -> tuple[int, ...]:
        causal = ctx.mask is not None and (
            ctx.mask.spec == "causal()" or mixed_tokens(x, past, ctx).causal
        )
        return self.offsets if causal else (*self.offsets, *(-d for d in self.offsets))

    def _valid(self, x: Tensor, past: int, shift: int, ctx: Context) -> Tensor:
        """(1 or B, n) bool: pairs of the new tokens that count."""
        new = x.shape[1]
        seen = pairs_seen(x, past, shift, ctx)
        if seen is None:
            other = torch.arange(past, past + new, device=x.device) - shift
            seen = ((other >= 0) & (other < past + new))[None]
        if self.recipe.window is None:
            return seen
        stride = self.recipe.stride or self.recipe.window
        at, _ = positions(new, past + new, ctx.q_positions, ctx.kv_positions, x.device)
        low, high = (at - shift, at) if shift > 0 else (at, at - shift)
        begin = low.div(stride, rounding_mode="floor") * stride  # of the last window with `low`
        return seen & (high < begin + self.recipe.window)

    def _mixed(self, x: Tensor, g: Tensor) -> Tensor:
        weight = self.gate.weight
        alpha = torch.sigmoid(
            functional.linear(x, weight[:, : self.dim], self.gate.bias)
            + functional.linear(g, weight[:, self.dim :])
        )
        return self.drop(self.norm(g + alpha * (x - g)))

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"offsets={self.offsets}, wiring={self.recipe.wiring}"
