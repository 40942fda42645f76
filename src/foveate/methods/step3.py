"""Multi-matrix factorization attention (MFA) and its key-reuse form (MFA-KR), as in Step-3.

    z = RMSNorm(x W_qa),  q_h = z W_qb,h,  k = x W_k,  v = x W_v,  y = concat_h(o_h) W_o

Many query heads of a large width C share one key and one value head; what makes that affordable is
the low rank r_q of the query projection. Hu et al. 2024, arXiv 2412.19255; the layer as released in
Step-3, StepFun 2025, arXiv 2507.19427. The norm stands between W_qa and W_qb, RoPE turns all C
dimensions, the scale is C ** -0.5. MFA-KR drops W_v:

    v_j = k_j (I + N diag(alpha))        k before RoPE, alpha = 0 at the start

so that only k is cached, un-rotated, and turned when it is read. Being linear in k the factor can
wait: sum_j p_j v_j = (sum_j p_j k_j) (I + N diag(alpha)).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.ops.masks.checks import whole
from foveate.parts.cache import Field
from foveate.parts.context import Phase
from foveate.parts.kv_cache import Entries, TokenCache, token_field
from foveate.parts.norm import RMSNorm
from foveate.parts.projection import (
    QKV,
    Positions,
    Projection,
    Recipe,
    Sizes,
    Turn,
    columns_of,
    join_heads,
    positive,
    rows_of,
    share,
    split_heads,
)


@dataclass(frozen=True)
class MFA(Recipe):
    """Many wide query heads of low rank on one key/value head; 2 C numbers cached per token.

    Step-3: 64 heads on a width of 7168, "mfa(head_dim=256, query_rank=2048)".

    Attributes:
        head_dim: C, width of all heads; None is the layer's head_dim or dim / num_heads.
        query_rank: r_q; None is C, as in the MFA paper.
        norm: whether the RMSNorm stands between the two query matrices.
        eps: of that norm.

    Raises:
        InputError: head_dim or query_rank below 1, or eps not above 0.
    """

    head_dim: int | None = None
    query_rank: int | None = None
    norm: bool = True
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("head_dim", "query_rank"):
            if getattr(self, name) is not None:
                whole(type(self).__name__, name, getattr(self, name), least=1)
        positive(type(self).__name__, eps=self.eps)

    @override
    def build(self, sizes: Sizes) -> MFAProjection:
        return MFAProjection(sizes, self)


@dataclass(frozen=True)
class MFAKR(MFA):
    """MFA whose values are made from its keys; C numbers cached per token.

    Attributes:
        head_dim: as in MFA.
        query_rank: as in MFA.
        norm: as in MFA.
        eps: as in MFA.

    Raises:
        InputError: head_dim or query_rank below 1, or eps not above 0.
    """

    @override
    def build(self, sizes: Sizes) -> MFAKRProjection:
        return MFAKRProjection(sizes, self)


class MFAProjection(Projection):
    """Steps A.1 to A.5: m = `heads` query heads of width C over one key and one value head.

    Weights: q_down W_qa (r_q, dim), q_up W_qb (m C, r_q), k W_k and v W_v (C, dim), out W_o
    (dim, m C).
    """

    def __init__(self, sizes: Sizes, recipe: MFA) -> None:
        super().__init__()
        width = recipe.head_dim or sizes.width
        rank = recipe.query_rank or width
        self.heads, self.head_dim = sizes.num_heads, width
        self.scale, self.rope_dim = width**-0.5, width
        self.q_down = nn.Linear(sizes.dim, rank, sizes.bias)
        self.q_norm = RMSNorm(rank, recipe.eps) if recipe.norm else nn.Identity()
        self.q_up = nn.Linear(rank, self.heads * width, sizes.bias)
        self.k = nn.Linear(sizes.source, width, sizes.bias)
        self._make_value(sizes)
        self.out = nn.Linear(self.heads * width, sizes.dim, sizes.out_bias)

    def _make_value(self, sizes: Sizes) -> None:
        self.v = nn.Linear(sizes.source, self.head_dim, sizes.bias)

    @property
    @override
    def fields(self) -> tuple[Field, ...]:
        return (token_field("k", 1, self.head_dim), token_field("v", 1, self.head_dim))

    @override
    def query(self, x: Tensor) -> Tensor:
        return split_heads(self.q_up(self.q_norm(self.q_down(x))), self.heads)

    @override
    def entries(
        self, x_kv: Tensor, cache: TokenCache | None = None, phase: Phase = "prefill"
    ) -> Entries:
        return {"k": self.k(x_kv)[:, None], "v": self.v(x_kv)[:, None]}

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
        """Split W_qb by columns and W_o by rows; the rest, and the cache, is on every rank."""
        mine = share(self.heads, rank, ranks, "query heads")
        part = deepcopy(self)
        part.heads = mine.stop - mine.start
        part.q_up = rows_of(self.q_up, mine, self.head_dim)
        part.out = columns_of(self.out, mine, self.head_dim, first=rank == 0)
        return part


class MFAKRProjection(MFAProjection):
    """Step B: v = k + alpha * (k N); `reuse` N is (C, C), `alpha` (C,).

    Prefill makes v; decoding attends to the un-rotated k as values and applies I + N diag(alpha) to
    what comes out, once per query instead of once per key. `fold_` puts it into W_o for good.
    """

    rotates_on_read: ClassVar[bool] = True

    @override
    def _make_value(self, sizes: Sizes) -> None:
        self.reuse = nn.Parameter(torch.zeros(self.head_dim, self.head_dim))
        self.alpha = nn.Parameter(torch.zeros(self.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N normal with deviation C ** -0.5 and alpha zero: training starts from v = k."""
        nn.init.normal_(self.reuse, std=self.head_dim**-0.5)
        nn.init.zeros_(self.alpha)

    @property
    @override
    def fields(self) -> tuple[Field, ...]:
        return (token_field("k", 1, self.head_dim),)

    @override
    def entries(
        self, x_kv: Tensor, cache: TokenCache | None = None, phase: Phase = "prefill"
    ) -> Entries:
        return {"k": self.k(x_kv)[:, None]}

    @override
    def rotate(
        self, q: Tensor, entries: Entries, positions: Positions, turn: Turn
    ) -> tuple[Tensor, Entries]:
        turned = entries | {"turned": turn(entries["k"], positions.key)}
        return turn(q, positions.query), turned

    @override
    def expand(self, entries: Entries) -> tuple[Tensor, Tensor]:
        return entries["turned"], self._values(entries["k"])

    @override
    def absorbs(self, phase: Phase) -> bool:
        return phase == "decode"

    @override
    def absorb(self, q: Tensor, entries: Entries) -> QKV:
        return QKV(q, entries["turned"], entries["k"])

    @override
    def output(self, o: Tensor, x: Tensor, *, absorbed: bool = False) -> Tensor:
        return super().output(self._values(o) if absorbed else o, x)

    def _values(self, k: Tensor) -> Tensor:
        """K (I + N diag(alpha)) for the last axis."""
        return (k + self.alpha * (k @ self.reuse)).to(k.dtype)  # autocast: alpha is in fp32

    @torch.no_grad()
    def fold_(self) -> Self:
        """Put I + N diag(alpha) into W_o, head by head, and set alpha to 0: the same outputs."""
        c = self.head_dim
        factor = torch.eye(c, dtype=torch.float64, device=self.alpha.device)
        factor = factor + self.reuse.double() * self.alpha.double()
        per_head = self.out.weight.double().unflatten(1, (self.heads, c))
        folded = torch.einsum("dhk,ck->dhc", per_head, factor)
        self.out.weight.copy_(folded.flatten(1))
        self.alpha.zero_()
        return self
