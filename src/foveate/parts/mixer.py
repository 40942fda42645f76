"""Mixer: a layer that mixes tokens without queries, keys and values of the usual kind.

A layer calls it as it would call an attention's projection, attention and output in one:

    y = mixer(x, ctx)                             x, y (B, L, dim); all tokens at once
    y = mixer(x_new, ctx), ctx.cache a StateCache the next tokens, the past in the mixer's state
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from foveate.ops.errors import InputError
from foveate.ops.masks.base import positions
from foveate.ops.masks.checks import whole
from foveate.parts.attention import EVERYTHING, remember
from foveate.parts.context import Context
from foveate.parts.reference import Reference
from foveate.parts.rope import Rope
from foveate.parts.state import State, StateCache
from foveate.parts.tokens import Tokens, tokens_of


@dataclass(frozen=True)
class MixerSizes:
    """The sizes of a layer that a mixer is built for.

    Attributes:
        dim: width of x and y.
        num_heads: heads of the model, for mixers that have some.
        head_dim: width of a head; None is dim / num_heads.
        layer: index of the layer, from 0.
        layers: of the whole model, for schedules over its depth; None is unknown.

    Raises:
        InputError: a size below 1.
    """

    dim: int
    num_heads: int = 1
    head_dim: int | None = None
    layer: int = 0
    layers: int | None = None

    def __post_init__(self) -> None:
        whole("MixerLayer", "dim", self.dim, least=1)
        whole("MixerLayer", "num_heads", self.num_heads, least=1)
        whole("MixerLayer", "layer", self.layer, least=0)

    @property
    def width(self) -> int:
        """head_dim, or dim / num_heads."""
        if self.head_dim is not None:
            return self.head_dim
        if self.dim % self.num_heads:
            raise InputError(
                f"MixerLayer(dim={self.dim}, num_heads={self.num_heads}): the heads don't divide "
                "the width; give head_dim."
            )
        return self.dim // self.num_heads


class MixerRecipe(ABC):
    """A mixer's hyper-parameters: a frozen dataclass, made by `foveate.methods.make`."""

    @abstractmethod
    def build(self, sizes: MixerSizes) -> Mixer:
        """The mixer for these sizes, with fresh weights.

        Raises:
            InputError: the hyper-parameters don't fit the sizes.
        """


class Mixer(nn.Module, ABC):
    """See the module's text. B batch, L length.

    Attributes:
        carries: whether y has x in it already (a gate blends them), so that a block adds no
            residual around the mixer and normalises behind it: u = norm(y), norm(u + ffn(u)).
        rope_dim: dimensions of its heads that turn with positions, 0 for none; `rope` are then the
            rotary positions of the layer, set from outside, None for no rotation.
        interleaved: whether rotary pairs are neighbours by default.
        reference: the stream beside the input that it takes its queries and keys from, if any.
    """

    interleaved: ClassVar[bool] = False
    carries: bool = False
    rope_dim: int = 0
    rope: Rope | None = None
    reference: Reference | None = None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Mix x (B, L, dim): `step` with a state in `ctx.cache`, else `full`."""
        if isinstance(ctx.cache, StateCache):
            return self.step(x, ctx, ctx.cache.state)
        return self.full(x, ctx)

    @abstractmethod
    def full(self, x: Tensor, ctx: Context) -> Tensor:
        """All tokens x (B, L, dim) at once -> y (B, L, dim)."""

    @abstractmethod
    def new_state(self) -> State:
        """An empty state.

        Raises:
            InputError: the mixer has no causal form, and so none to decode with.
        """

    @abstractmethod
    def step(self, x: Tensor, ctx: Context, state: State) -> Tensor:
        """The next n >= 1 tokens x (B, n, dim) of each sequence -> y (B, n, dim).

        `ctx.mask` and the positions of `ctx` count all len(state) + n tokens, and `ctx.real` tells
        padding among the new ones. The state takes the new tokens in.
        """


def mixed_tokens(x: Tensor, past: int, ctx: Context) -> Tokens:
    """Which tokens are real and where they stand, as `parts.tokens.tokens_of`; x (B, n, dim)."""
    keys = x[:, :1, None].expand(-1, -1, past + x.shape[1], -1)
    return tokens_of(x[:, None], keys, ctx)


def pairs_seen(x: Tensor, past: int, shift: int, ctx: Context) -> Tensor | None:
    """Whether each new token may look at the one `shift` places before it (behind, if negative).

    Answered by `ctx.mask` alone, so that padding, documents and windows count in any mixer.

    Args:
        x: (B, n, dim), the new tokens.
        past: tokens before them.
        shift: 1 or more, or -1 or less.
        ctx: mask and positions of all past + n tokens.

    Returns:
        (1 or B, n) bool; places outside of the sequence aren't seen. None where all are seen that
        lie inside.
    """
    mask = EVERYTHING if ctx.mask is None else ctx.mask
    new = x.shape[1]
    plain = ctx.q_positions is None and ctx.kv_positions is None
    if plain and (mask is EVERYTHING or (shift > 0 and mask.spec == "causal()")):
        return None

    def look() -> Tensor:
        q_pos, k_pos = positions(new, past + new, ctx.q_positions, ctx.kv_positions, x.device)
        index = torch.arange(past, past + new, device=x.device) - shift
        inside = (index >= 0) & (index < past + new)
        k_pos = k_pos[:, index.clamp(0, past + new - 1)]
        batches = max(mask.groups()[0], len(q_pos), len(k_pos))
        rows = []
        for b in range(batches):
            q, k = (p[b if len(p) > 1 else 0] for p in (q_pos, k_pos))
            heads = (mask._element(q, k, b, h) for h in range(mask.groups()[1]))
            rows.append(torch.stack(list(heads)).all(0) & inside)
        return torch.stack(rows)

    return remember(ctx, (pairs_seen, mask, past, new, shift, x.device), look)
