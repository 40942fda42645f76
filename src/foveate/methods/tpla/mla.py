"""Multi-head latent attention (MLA) with decoupled RoPE, in its naive and its absorbed form.

    cq = RMSNorm(x W_DQ),  q_h = cq W_UQ,h,  q_pe,h = RoPE(cq W_QR,h)     (no query latent: cq = x)
    chat = RMSNorm(x W_DKV) [r],  k_pe = RoPE(x W_KR) [d_r], one for all heads
    naive       k_h = chat W_UK,h,  v_h = chat W_UV,h
                s = (q_h k_h^T + q_pe,h k_pe^T) sc,  o_h = p v_h
    absorbed    Q_h = q_h W_UK,h^T
                s = (Q_h chat^T + q_pe,h k_pe^T) sc,  z_h = p chat,  o_h = z_h W_UV,h

with sc = m^2 / sqrt(d_h + d_r). The absorbed form is multi-query attention with keys of r + d_r and
values of r numbers. The cache keeps chat, after its norm, and k_pe, after its rotation: r + d_r
numbers for each token, whatever the number of heads. DeepSeek-V2 2024, arXiv 2405.04434, section
2.1; as in the TPLA paper, arXiv 2508.15881, section 2.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.ops.errors import InputError
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
class MLA(Recipe):
    """Keys and values of all heads from one latent; r + d_r numbers cached per token.

    DeepSeek-V3: 128 heads, "mla(latent=512, rope_dim=64, head_dim=128, query_rank=1536)".

    Attributes:
        latent: r; None is 4 d_h, as in DeepSeek.
        rope_dim: d_r, even; None is about d_h / 2, as in DeepSeek.
        query_rank: r_q; None is no query latent.
        head_dim: d_h, without the rotary part; None is the layer's.
        value_dim: d_v; None is d_h.
        mscale: m of long-context models, 0.1 mscale ln(factor) + 1 under YaRN.
        eps: of the norms.

    Raises:
        InputError: a size below 1, an odd rope_dim, or eps or mscale not above 0.
    """

    latent: int | None = None
    rope_dim: int | None = None
    query_rank: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    mscale: float = 1.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("latent", "query_rank", "head_dim", "value_dim"):
            if getattr(self, field) is not None:
                whole(name, field, getattr(self, field), least=1)
        if self.rope_dim is not None and whole(name, "rope_dim", self.rope_dim, least=0) % 2:
            raise InputError(f"{name}(rope_dim={self.rope_dim}): expected an even number.")
        positive(name, eps=self.eps, mscale=self.mscale)

    @override
    def build(self, sizes: Sizes) -> MLAProjection:
        return MLAProjection(sizes, self)


class MLAProjection(Projection):
    """Steps 1 to 5.

    Weights, laid out as DeepSeek's: q_down W_DQ (r_q, dim) or None, q_up W_UQ and W_QR
    (h (d_h + d_r), r_q or dim), kv_down W_DKV and W_KR (r + d_r, dim), kv_norm gamma (r,), kv_up
    W_UK and W_UV (h (d_h + d_v), r), out W_O (dim, h d_v). Rotary pairs are neighbours.
    """

    interleaved: ClassVar[bool] = True

    def __init__(self, sizes: Sizes, recipe: MLA) -> None:
        super().__init__()
        d_h = recipe.head_dim or sizes.width
        d_r = 2 * max(1, d_h // 4) if recipe.rope_dim is None else recipe.rope_dim
        rank = recipe.query_rank
        self.heads, self.head_dim, self.rope_dim = sizes.num_heads, d_h, d_r
        self.value_dim, self.latent = recipe.value_dim or d_h, recipe.latent or 4 * d_h
        self.scale = recipe.mscale**2 * (d_h + d_r) ** -0.5
        self.mscale, self.eps = recipe.mscale, recipe.eps
        self.q_down = None if rank is None else nn.Linear(sizes.dim, rank, sizes.bias)
        self.q_norm = None if rank is None else RMSNorm(rank, recipe.eps)
        self.q_up = nn.Linear(rank or sizes.dim, self.heads * (d_h + d_r), bias=False)
        self.kv_down = nn.Linear(sizes.source, self.latent + d_r, sizes.bias)
        self.kv_norm: nn.Module = RMSNorm(self.latent, recipe.eps)
        self.kv_up = nn.Linear(self.latent, self.heads * (d_h + self.value_dim), bias=False)
        self.out = nn.Linear(self.heads * self.value_dim, sizes.dim, sizes.out_bias)

    @property
    @override
    def fields(self) -> tuple[Field, ...]:
        return (token_field("latent", 1, self.latent + self.rope_dim),)

    def summed_per_token(self, kv_len: int) -> int:
        """Numbers that devices sum for each token that is decoded against kv_len: D, the output."""
        return self.out.out_features

    def key_up(self) -> Tensor:
        """W_UK^T (h, d_h, r)."""
        return self._up()[:, : self.head_dim]

    def value_up(self) -> Tensor:
        """W_UV^T (h, d_v, r)."""
        return self._up()[:, self.head_dim :]

    def _up(self) -> Tensor:
        return self.kv_up.weight.unflatten(0, (self.heads, -1))

    @override
    def query(self, x: Tensor) -> Tensor:
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(self.q_down(x))
        return split_heads(self.q_up(x), self.heads)

    @override
    def entries(
        self, x_kv: Tensor, cache: TokenCache | None = None, phase: Phase = "prefill"
    ) -> Entries:
        c, k_pe = self.kv_down(x_kv).split((self.latent, self.rope_dim), -1)
        c = self.kv_norm(c).to(k_pe.dtype)  # autocast leaves norms in fp32; the cache is not to be
        return {"latent": torch.cat((c, k_pe), -1)[:, None]}

    @override
    def rotate(
        self, q: Tensor, entries: Entries, positions: Positions, turn: Turn
    ) -> tuple[Tensor, Entries]:
        turned = self._turn_tail(entries["latent"], positions.key, turn)
        return self._turn_tail(q, positions.query, turn), entries | {"latent": turned}

    def _turn_tail(self, x: Tensor, positions: Tensor, turn: Turn) -> Tensor:
        """The last d_r dimensions turn; they are decoupled from the rest."""
        if not self.rope_dim:
            return x
        rest, tail = x[..., : -self.rope_dim], x[..., -self.rope_dim :]
        return torch.cat((rest, turn(tail, positions)), -1)

    @override
    def expand(self, entries: Entries) -> tuple[Tensor, Tensor]:
        held = entries["latent"]
        return self._expanded(held[:, 0, :, : self.latent], held[..., self.latent :])

    def _expanded(self, latent: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Step 4a from chat (B, n, r) and k_pe (B, 1, n, d_r)."""
        up = split_heads(self.kv_up(latent), self.heads)
        k, v = up.split((self.head_dim, self.value_dim), -1)
        return torch.cat((k, k_pe.expand(-1, self.heads, -1, -1)), -1), v

    @override
    def absorbs(self, phase: Phase) -> bool:
        return phase == "decode"

    @override
    def absorb(self, q: Tensor, entries: Entries) -> QKV:
        held = entries["latent"]
        wide = torch.cat((self._absorbed(q), q[..., self.head_dim :]), -1)
        return QKV(wide, held, held[..., : self.latent])

    def _absorbed(self, q: Tensor) -> Tensor:
        """Q_h = q_h W_UK,h^T, (B, h, L, r)."""
        return torch.einsum("bhld,hdr->bhlr", q[..., : self.head_dim], self.key_up())

    @override
    def output(self, o: Tensor, x: Tensor, *, absorbed: bool = False) -> Tensor:
        if absorbed:
            o = torch.einsum("bhlr,hvr->bhlv", o, self.value_up())
        return self.out(join_heads(o))

    @override
    def shard(self, rank: int, ranks: int) -> Self:
        """Split all that has heads; the latent, and so the cache, is whole on every rank."""
        mine = share(self.heads, rank, ranks, "heads")
        part = deepcopy(self)
        part.heads = mine.stop - mine.start
        part.q_up = rows_of(self.q_up, mine, self.head_dim + self.rope_dim)
        part.kv_up = rows_of(self.kv_up, mine, self.head_dim + self.value_dim)
        part.out = columns_of(self.out, mine, self.value_dim, first=rank == 0)
        return part
