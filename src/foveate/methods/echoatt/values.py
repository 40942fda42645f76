"""The projection of a follower: values and the output, no queries and no keys.

    v_g = x W_V,g,   o_i = A_leader,i v_g(i),   y = concat_i(o_i) W_O

Rajabzadeh et al. 2024, arXiv 2409.14595, section 2: W_Q and W_K of a follower are deleted, D (h d +
h_kv d) weights. The cache keeps Hkv D numbers for each token, half of what its layer kept.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Self

from torch import Tensor
from typing_extensions import override

from foveate.methods.echoatt.attention import EchoAtt
from foveate.methods.gqa import GroupedProjection
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention
from foveate.parts.cache import Field
from foveate.parts.context import Context, Phase
from foveate.parts.kv_cache import Entries, TokenCache, token_field
from foveate.parts.projection import (
    QKV,
    Positions,
    Recipe,
    Selection,
    Sizes,
    Turn,
    columns_of,
    rows_of,
    split_heads,
)


@dataclass(frozen=True)
class EchoValues(Recipe):
    """Values alone, for a layer that copies another one's attention map (attention="echoatt(...)").

    Attributes:
        kv_heads: Hkv, a divisor of the number of heads; None is all of them.

    Raises:
        InputError: kv_heads below 1, or no divisor.
    """

    kv_heads: int | None = None

    def __post_init__(self) -> None:
        if self.kv_heads is not None:
            whole("EchoValues", "kv_heads", self.kv_heads, least=1)

    @override
    def build(self, sizes: Sizes) -> ValuesProjection:
        kv_heads = self.kv_heads or sizes.num_heads
        return ValuesProjection(sizes, sizes.num_heads, kv_heads, sizes.width)


class ValuesProjection(GroupedProjection):
    """W_V and W_O of `GroupedProjection`; queries and keys have width 0."""

    def __init__(self, sizes: Sizes, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__(sizes, heads, kv_heads, head_dim)
        del self.q, self.k
        self.rope_dim = 0

    @property
    @override
    def maps(self) -> tuple[Tensor, ...]:
        return ()

    @property
    @override
    def fields(self) -> tuple[Field, ...]:
        return (token_field("v", self.kv_heads, self.head_dim),)

    @override
    def query(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.heads, x.shape[1], 0)

    @override
    def entries(
        self, x_kv: Tensor, cache: TokenCache | None = None, phase: Phase = "prefill"
    ) -> Entries:
        return {"v": split_heads(self.v(x_kv), self.kv_heads)}

    @override
    def rotate(
        self, q: Tensor, entries: Entries, positions: Positions, turn: Turn
    ) -> tuple[Tensor, Entries]:
        return q, entries

    @override
    def expand(self, entries: Entries) -> tuple[Tensor, Tensor]:
        return entries["v"][..., :0], entries["v"]

    @override
    def attend(
        self, attention: Attention, qkv: QKV, ctx: Context, selection: Selection | None
    ) -> Tensor:
        if not isinstance(attention, EchoAtt):
            raise InputError(
                f"Layer {ctx.layer} has values only and copies an earlier layer's map, but its "
                f"attention is {type(attention).__name__}; give all layers the same "
                'attention="echoatt(followers=[...])".'
            )
        return super().attend(attention, qkv, ctx, selection)

    @override
    def shard(self, rank: int, ranks: int) -> Self:
        mine, theirs = self.shares(rank, ranks)
        part = deepcopy(self)
        part.heads, part.kv_heads = mine.stop - mine.start, theirs.stop - theirs.start
        part.v = rows_of(self.v, theirs, self.head_dim)
        part.out = columns_of(self.out, mine, self.head_dim, first=rank == 0)
        return part
