"""Multi-head, grouped-query and multi-query projections.

    q_i = x W_Q,i,   k_g = x W_K,g,   v_g = x W_V,g,   y = concat_i(o_i) W_O

Query head i reads key/value head g = floor(i / (Hq / Hkv)). MHA: Vaswani et al. 2017, arXiv
1706.03762, section 3.2.2; MQA (Hkv = 1): Shazeer 2019, arXiv 1911.02150; GQA: Ainslie et al. 2023,
arXiv 2305.13245. The cache keeps rotated k, and v: 2 Hkv D numbers for each token.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn
from typing_extensions import override

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.cache import Field
from foveate.parts.context import Phase
from foveate.parts.kv_cache import Entries, TokenCache, token_field
from foveate.parts.projection import (
    Positions,
    Projection,
    Recipe,
    Sizes,
    Turn,
    columns_of,
    join_heads,
    rows_of,
    share,
    split_heads,
)


class GroupedProjection(Projection):
    """Hq query heads on Hkv key/value heads, each of width D; all MHA, GQA and MQA.

    Args:
        sizes: dim, kv_dim and biases are read.
        heads: Hq.
        kv_heads: Hkv, a divisor of Hq.
        head_dim: D; the scale is D ** -0.5.

    Raises:
        InputError: Hkv doesn't divide Hq.
    """

    def __init__(self, sizes: Sizes, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        if heads % kv_heads:
            raise InputError(
                f"{heads} query heads can't share {kv_heads} key/value heads evenly; expected a "
                "divisor."
            )
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale, self.rope_dim = head_dim**-0.5, head_dim
        self.q = nn.Linear(sizes.dim, heads * head_dim, sizes.bias)
        self.k = nn.Linear(sizes.source, kv_heads * head_dim, sizes.bias)
        self.v = nn.Linear(sizes.source, kv_heads * head_dim, sizes.bias)
        self.out = nn.Linear(heads * head_dim, sizes.dim, sizes.out_bias)

    @property
    @override
    def maps(self) -> tuple[Tensor, ...]:
        return self.q.weight, self.k.weight, self.v.weight

    @property
    @override
    def fields(self) -> tuple[Field, ...]:
        return (
            token_field("k", self.kv_heads, self.head_dim),
            token_field("v", self.kv_heads, self.head_dim),
        )

    @override
    def query(self, x: Tensor) -> Tensor:
        return split_heads(self.q(x), self.heads)

    @override
    def entries(
        self, x_kv: Tensor, cache: TokenCache | None = None, phase: Phase = "prefill"
    ) -> Entries:
        k, v = self.k(x_kv), self.v(x_kv)
        return {"k": split_heads(k, self.kv_heads), "v": split_heads(v, self.kv_heads)}

    @override
    def rotate(
        self, q: Tensor, entries: Entries, positions: Positions, turn: Turn
    ) -> tuple[Tensor, Entries]:
        turned = entries | {"k": turn(entries["k"], positions.key)}
        return turn(q, positions.query), turned

    @override
    def expand(self, entries: Entries) -> tuple[Tensor, Tensor]:
        return entries["k"], entries["v"]

    @override
    def output(self, o: Tensor, x: Tensor, *, absorbed: bool = False) -> Tensor:
        return self.out(join_heads(o))

    @override
    def shard(self, rank: int, ranks: int) -> Self:
        mine, theirs = self.shares(rank, ranks)
        part = deepcopy(self)
        width = self.head_dim
        part.heads, part.kv_heads = mine.stop - mine.start, theirs.stop - theirs.start
        part.q = rows_of(self.q, mine, width)
        part.k, part.v = rows_of(self.k, theirs, width), rows_of(self.v, theirs, width)
        part.out = columns_of(self.out, mine, width, first=rank == 0)
        return part

    def shares(self, rank: int, ranks: int) -> tuple[slice, slice]:
        """The query heads and the key/value heads of a rank.

        Raises:
            InputError: the heads don't divide evenly.
        """
        mine = share(self.heads, rank, ranks, "query heads")
        groups = self.heads // self.kv_heads
        if self.kv_heads % ranks == 0:
            theirs = share(self.kv_heads, rank, ranks, "key/value heads")
        elif groups % (mine.stop - mine.start) == 0:  # a rank's heads share one, copied to all
            theirs = slice(mine.start // groups, mine.start // groups + 1)
        else:
            raise InputError(
                f"shard: {self.heads} query heads on {self.kv_heads} key/value heads can't be "
                f"split over {ranks} ranks so that no rank's heads straddle a group."
            )
        return mine, theirs


@dataclass(frozen=True)
class MHA(Recipe):
    """A key and a value head for every query head; the cache keeps 2 H D numbers per token."""

    @override
    def build(self, sizes: Sizes) -> GroupedProjection:
        return GroupedProjection(sizes, sizes.num_heads, sizes.num_heads, sizes.width)


@dataclass(frozen=True)
class MQA(Recipe):
    """One key and one value head for all query heads; the cache keeps 2 D numbers per token."""

    @override
    def build(self, sizes: Sizes) -> GroupedProjection:
        return GroupedProjection(sizes, sizes.num_heads, 1, sizes.width)


@dataclass(frozen=True)
class GQA(Recipe):
    """Groups of query heads share a key/value head; the cache keeps 2 Hkv D numbers per token.

    Attributes:
        kv_heads: Hkv, a divisor of the number of heads; None is a quarter of them, at least 1.

    Raises:
        InputError: kv_heads below 1, or no divisor.
    """

    kv_heads: int | None = None

    def __post_init__(self) -> None:
        if self.kv_heads is not None:
            whole("GQA", "kv_heads", self.kv_heads, least=1)

    @override
    def build(self, sizes: Sizes) -> GroupedProjection:
        kv_heads = self.kv_heads or max(1, sizes.num_heads // 4)
        return GroupedProjection(sizes, sizes.num_heads, kv_heads, sizes.width)
