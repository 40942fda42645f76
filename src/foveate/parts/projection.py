"""Projection: how x becomes q, k and v, what of it is cached, and how head outputs become y.

A layer runs it in this order:

    q = query(x)                                  (B, Hq, Lq, D), not rotated
    new = entries(x_kv)                           what the cache keeps of each new token
    q, new = rotate(q, new, positions, turn)      here, or after the next line: `rotates_on_read`
    held = cache.append(new)                      or just `new` without a cache
    k, v = expand(held)                           keys and values as such, or
    q, k, v = absorb(q, held)                     the same scores without ever making them
    o = attend(attention, q, k, v, ctx)           (B, Hq, Lq, Dv)
    y = output(o, x)                              (B, Lq, dim)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention
from foveate.parts.cache import Field
from foveate.parts.context import Context, Phase
from foveate.parts.kv_cache import Entries, TokenCache

Turn = Callable[[Tensor, Tensor], Tensor]  # x (B, H, L, R) and positions (L,) or (B, L) -> rotated


class Positions(NamedTuple):
    """Where queries stand, and the entries to be rotated: integer (L,) or (B, L) each."""

    query: Tensor
    key: Tensor


class QKV(NamedTuple):
    """What attention takes: (B, Hq, Lq, D), (B, Hkv, Lkv, D), (B, Hkv, Lkv, Dv)."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Selection:
    """What a projection decides for each token and query head.

    Attributes:
        gates: (B, Hq, Lq) factors on the heads' outputs; 0 where a head isn't active.
        active: (B, Hq, Lq) bool: pairs whose output counts; the others needn't be computed.
        aux: losses (names that end with "_loss", already weighted) and statistics.
    """

    gates: Tensor
    active: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a layer that a projection is built for.

    Attributes:
        dim: width of x and y.
        num_heads: heads H of the model; what it counts is said by each projection.
        head_dim: width of a head; None is dim / num_heads, or what the projection's paper says.
        kv_dim: width of x_kv; None is dim.
        bias: whether the maps into heads have biases.
        out_bias: whether the map out of them has one.

    Raises:
        InputError: a size below 1, or heads that don't divide the width when head_dim is None.
    """

    dim: int
    num_heads: int
    head_dim: int | None = None
    kv_dim: int | None = None
    bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        whole("Attention", "dim", self.dim, least=1)
        whole("Attention", "num_heads", self.num_heads, least=1)
        for name in ("head_dim", "kv_dim"):
            if getattr(self, name) is not None:
                whole("Attention", name, getattr(self, name), least=1)

    @property
    def width(self) -> int:
        """head_dim, or dim / num_heads."""
        if self.head_dim is not None:
            return self.head_dim
        if self.dim % self.num_heads:
            raise InputError(
                f"Attention(dim={self.dim}, num_heads={self.num_heads}): the heads don't divide "
                "the width; give head_dim."
            )
        return self.dim // self.num_heads

    @property
    def source(self) -> int:
        """Width of x_kv."""
        return self.dim if self.kv_dim is None else self.kv_dim


class Recipe(ABC):
    """A projection's hyper-parameters: a frozen dataclass, made by `foveate.methods.make`."""

    @abstractmethod
    def build(self, sizes: Sizes) -> Projection:
        """The projection for these sizes, with fresh weights.

        Raises:
            InputError: the hyper-parameters don't fit the sizes.
        """


class Projection(nn.Module, ABC):
    """See the module's text. B batch, Hq query heads, L length, D head size.

    Attributes:
        heads: Hq, query heads that attention sees.
        scale: factor on the scores.
        rope_dim: how many dimensions turn, 0 for none.
        interleaved: whether rotary pairs are neighbours by default.
        rotates_on_read: whether entries are kept un-rotated, and `rotate` runs on all of them.
        selects: whether `select` chooses heads; it is only called then.
    """

    heads: int
    scale: float
    rope_dim: int
    interleaved: ClassVar[bool] = False
    rotates_on_read: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """W_Q, W_K and W_V, where heads are made by just these; else none."""
        return ()

    @property
    def attends_once(self) -> bool:
        """Whether `attend` is one call of the attention on q, k and v, and nothing more."""
        return type(self).attend is Projection.attend

    @property
    @abstractmethod
    def fields(self) -> tuple[Field, ...]:
        """What the cache keeps of each token."""

    @abstractmethod
    def query(self, x: Tensor) -> Tensor:
        """From x (B, Lq, dim) to q (B, Hq, Lq, D), not rotated."""

    @abstractmethod
    def entries(
        self, x_kv: Tensor, cache: TokenCache | None = None, phase: Phase = "prefill"
    ) -> Entries:
        """From x_kv (B, L, kv_dim) to each field's (B, heads, L, width), not rotated."""

    @abstractmethod
    def rotate(
        self, q: Tensor, entries: Entries, positions: Positions, turn: Turn
    ) -> tuple[Tensor, Entries]:
        """Turn whatever of q and of the entries turns to its positions."""

    @abstractmethod
    def expand(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """Entries -> k (B, Hkv, L, D), v (B, Hkv, L, Dv)."""

    def absorbs(self, phase: Phase) -> bool:
        """Whether this phase runs `absorb` instead of `expand`."""
        return False

    def absorb(self, q: Tensor, entries: Entries) -> QKV:
        """The same attention on the entries as they are, for a projection with two forms."""
        raise InputError(f"{type(self).__name__} has one form only; use expand.")

    def select(self, x: Tensor, q: Tensor, real: Tensor | None, phase: Phase) -> Selection:
        """Which heads count for which token, from the layer's input or q.

        Args:
            x: (B, Lq, dim).
            q: (B, Hq, Lq, D), not rotated.
            real: (B, Lq) bool, False on padding; None is all real.
            phase: losses are only made for training.
        """
        raise InputError(f"{type(self).__name__} has no heads to choose from; all of them count.")

    def attend(
        self, attention: Attention, qkv: QKV, ctx: Context, selection: Selection | None
    ) -> Tensor:
        """The heads' outputs, (B, Hq, Lq, Dv), gates applied."""
        out = attention(*qkv, ctx).out
        if selection is None:
            return out
        return out * selection.gates.to(out.dtype)[..., None]

    @abstractmethod
    def output(self, o: Tensor, x: Tensor, *, absorbed: bool = False) -> Tensor:
        """Head outputs o (B, Hq, Lq, Dv) -> y (B, Lq, dim); `absorbed` after `absorb`."""

    @abstractmethod
    def shard(self, rank: int, ranks: int) -> Projection:
        """The part of one rank of tensor parallelism, with its own copy of the weights.

        Every rank takes the whole x; the sum of all ranks' y is the whole y.

        Raises:
            InputError: the heads don't divide evenly.
        """

    def new_cache(self, capacity: int = 0) -> TokenCache:
        """An empty cache with room for `capacity` tokens."""
        return TokenCache(self.fields, capacity)


def positive(recipe: str, **numbers: float) -> None:
    """Refuse numbers that aren't finite and above 0.

    Raises:
        InputError: one that isn't, by its name.
    """
    for name, value in numbers.items():
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise InputError(f"{recipe}({name}={value!r}): expected a finite number above 0.")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads * D) -> (B, heads, L, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, L, D) -> (B, L, heads * D)."""
    return x.transpose(1, 2).flatten(2)


def share(total: int, rank: int, ranks: int, what: str) -> slice:
    """The part of `total` things that a rank has."""
    if not 0 <= rank < ranks:
        raise InputError(f"shard(rank={rank}, ranks={ranks}): expected 0 <= rank < ranks.")
    if total % ranks:
        raise InputError(f"shard: {total} {what} can't be split evenly over {ranks} ranks.")
    size = total // ranks
    return slice(rank * size, (rank + 1) * size)


def rows_of(linear: nn.Linear, heads: slice, width: int) -> nn.Linear:
    """A map into heads (`width` rows each), for some of the heads: column-parallel."""
    part = slice(heads.start * width, heads.stop * width)
    bias = None if linear.bias is None else linear.bias[part]
    return _linear(linear.weight[part], bias)


def columns_of(linear: nn.Linear, heads: slice, width: int, *, first: bool) -> nn.Linear:
    """A map out of heads (`width` columns each), for some of them: row-parallel.

    The bias goes with the first rank, so that the sum has it once.
    """
    part = slice(heads.start * width, heads.stop * width)
    bias: Tensor | None = linear.bias
    if bias is not None and not first:
        bias = torch.zeros_like(bias)
    return _linear(linear.weight[:, part], bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    made = nn.Linear(columns, rows, bias is not None, device=weight.device, dtype=weight.dtype)
    made.weight.data = weight.detach().clone()
    if bias is not None:
        made.bias.data = bias.detach().clone()
    return made
