"""TPLA and GLA: latent attention whose latent is split over g groups of devices.

Group j has the slice j of r / g latent columns, its own norm and its own softmax:

    chat_j = c_j / sqrt(alpha_j / g * mean(c_j^2) + eps)
    s_j = (mu_j Q_j chat_j^T + q_pe k_pe^T) sc,  z_j = p_j chat_j,  y = sum_j concat(z_j W_UV_j) W_O

with Q_j = q W_UK[slice j]^T. In TPLA every group runs all heads; in GLA (grouped latent attention,
arXiv 2505.21487) head block j sees slice j alone, without mu. Either way it is grouped-query
attention with g key/value heads, TPLA with g h query heads: head block j is a copy of all heads,
on slice j. Here all groups run in one process; `shard` gives one rank its part. Tang et al. 2025,
arXiv 2508.15881, sections 3 and 4.

Cache per device: r / g + d_r numbers for each token, instead of r + d_r.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.tpla.mla import MLA, MLAProjection
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole
from foveate.parts.cache import Field
from foveate.parts.context import Phase
from foveate.parts.kv_cache import Entries, TokenCache, token_field
from foveate.parts.projection import QKV, Sizes, columns_of, join_heads, rows_of, share

Part = Literal["local", "exact"]
_CHOICES = {
    "heads": ("all", "blocks"),
    "norm": ("local", "exact"),
    "softmax": ("local", "exact"),
}


@dataclass(frozen=True)
class TPLA(MLA):
    """MLA with its latent split over groups; r / g + d_r numbers cached per token and device.

    Made fresh, all slices count alike: alpha and mu are g. `to_tpla` makes one from a trained MLA.

    Attributes:
        latent: as in MLA, r, a multiple of groups.
        rope_dim: as in MLA.
        query_rank: as in MLA.
        head_dim: as in MLA.
        value_dim: as in MLA.
        mscale: as in MLA.
        eps: as in MLA.
        groups: g.
        heads: "all" heads on every slice (TPLA), or head "blocks", each on its own (GLA).
        norm: "local" to each slice, or "exact" (one number per token is exchanged).
        softmax: "local" to each slice, or "exact" (partial scores are exchanged).
        pd_sep: whether prefill and training run exact MLA, and only tokens that are decoded see
            any approximation.

    Raises:
        InputError: an unknown choice or a size that doesn't fit.
    """

    groups: int = 2
    heads: Literal["all", "blocks"] = "all"
    norm: Part = "local"
    softmax: Part = "local"
    pd_sep: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("TPLA", "groups", self.groups, least=1)
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"TPLA({name}={value!r}) is unknown; {nearest(str(value), known)}")
        if self.heads == "blocks" and self.softmax == "exact":
            raise InputError(
                "TPLA(heads='blocks', softmax='exact'): in GLA a head has only its own slice, so "
                "there are no partial scores to exchange; use softmax='local'."
            )

    @override
    def build(self, sizes: Sizes) -> TPLAProjection:
        return TPLAProjection(sizes, self)


class TPLAProjection(MLAProjection):
    """Steps 11 to 21; weights as in MLA, in the basis of which the slices are cut, gamma being 1.

    Buffers: alpha and mu, (g,) each.
    """

    alpha: Tensor
    mu: Tensor

    def __init__(self, sizes: Sizes, recipe: TPLA) -> None:
        super().__init__(sizes, recipe)
        groups = recipe.groups
        if self.latent % groups:
            raise InputError(
                f"TPLA(groups={groups}): expected a divisor of the latent's {self.latent}."
            )
        if recipe.heads == "blocks" and self.heads % groups:
            raise InputError(
                f"TPLA(groups={groups}, heads='blocks'): expected a divisor of {self.heads} heads."
            )
        self.recipe = recipe
        self.kv_norm = nn.Identity()
        self.groups, self.all_groups, self.blocks = groups, groups, recipe.heads == "blocks"
        self.local_norm = recipe.norm == "local"
        self.local_softmax = recipe.softmax == "local"
        self.pd_sep = recipe.pd_sep
        # Sums (B, 1, n, 1) over the slices of all ranks, for an exact norm there.
        self.over_ranks: Callable[[Tensor], Tensor] | None = None
        self.register_buffer("alpha", torch.full((groups,), float(groups)))
        self.register_buffer("mu", torch.full((groups,), 1.0 if self.blocks else float(groups)))

    @property
    def slice_width(self) -> int:
        """Columns of a slice, r / g."""
        return self.latent // self.groups

    @property
    def elements_per_device(self) -> int:
        """Numbers that a device caches for each token: r / g + d_r."""
        return self.slice_width + self.rope_dim

    @property
    @override
    def fields(self) -> tuple[Field, ...]:
        return (token_field("latent", self.groups, self.elements_per_device),)

    @property
    @override
    def attends_once(self) -> bool:
        """Not: with slices in decoding, each a softmax of its own, and without in prefill."""
        return False

    @override
    def summed_per_token(self, kv_len: int) -> int:
        """D as MLA; one number more for an exact norm, h scores a key for an exact softmax."""
        exact_scores = 0 if self.local_softmax else self.heads * kv_len
        return super().summed_per_token(kv_len) + (not self.local_norm) + exact_scores

    @override
    def entries(
        self, x_kv: Tensor, cache: TokenCache | None = None, phase: Phase = "prefill"
    ) -> Entries:
        c, k_pe = self.kv_down(x_kv).split((self.latent, self.rope_dim), -1)
        sliced = c.unflatten(-1, (self.groups, -1)).transpose(1, 2)
        wide = sliced.to(torch.promote_types(c.dtype, torch.float32))
        mean = wide.square().mean(-1, keepdim=True)
        if self.local_norm and not self._separate(phase):
            mean = mean * (self.alpha / self.all_groups)[:, None, None]
        elif self.over_ranks is None:
            mean = mean.mean(1, keepdim=True)
        else:
            mean = self.over_ranks(mean.sum(1, keepdim=True)) / self.all_groups
        chat = (wide / (mean + self.eps).sqrt()).to(c.dtype)
        k_pe = k_pe[:, None].expand(-1, self.groups, -1, -1)
        return {"latent": torch.cat((chat, k_pe), -1)}

    def _separate(self, phase: Phase) -> bool:
        """Whether this phase is exact MLA (step 19)."""
        return self.pd_sep and phase != "decode"

    @override
    def expand(self, entries: Entries) -> tuple[Tensor, Tensor]:
        latent, k_pe = self._whole(entries)
        return self._expanded(latent[:, 0], k_pe)

    def _whole(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """All slices side by side (B, 1, n, r), and k_pe (B, 1, n, d_r)."""
        held = entries["latent"]
        latent = held[..., : self.slice_width].transpose(1, 2).flatten(2)
        return latent[:, None], held[:, :1, :, self.slice_width :]

    @override
    def absorbs(self, phase: Phase) -> bool:
        return not self._separate(phase)

    @override
    def absorb(self, q: Tensor, entries: Entries) -> QKV:
        wide, q_pe = self._absorbed(q), q[..., self.head_dim :]
        if not self.local_softmax:
            latent, k_pe = self._whole(entries)
            return QKV(torch.cat((wide, q_pe), -1), torch.cat((latent, k_pe), -1), latent)
        held = entries["latent"]
        parts = wide.unflatten(-1, (self.groups, -1))
        if self.blocks:  # head block j takes slice j
            block = self._block(wide.device)
            mine = parts.gather(
                3, block[None, :, None, None, None].expand(*wide.shape[:3], 1, parts.shape[-1])
            )
            mine = torch.cat((mine.squeeze(3), q_pe), -1)
            return QKV(mine, held, held[..., : self.slice_width])
        mu = self.mu[:, None, None, None].to(q.dtype)
        mine = parts.permute(0, 3, 1, 2, 4) * mu  # (B, g, h, L, r / g)
        q_pe = q_pe[:, None].expand(-1, self.groups, -1, -1, -1)
        copies = torch.cat((mine, q_pe), -1).flatten(1, 2)
        return QKV(copies, held, held[..., : self.slice_width])

    def _block(self, device: torch.device) -> Tensor:
        """(h,) the slice that each head sees in GLA."""
        return torch.arange(self.heads, device=device) // (self.heads // self.groups)

    @override
    def output(self, o: Tensor, x: Tensor, *, absorbed: bool = False) -> Tensor:
        if not absorbed or not self.local_softmax:
            return super().output(o, x, absorbed=absorbed)
        up = self.value_up().unflatten(-1, (self.groups, -1))  # (h, d_v, g, r / g)
        if self.blocks:
            block = self._block(o.device)
            mine = up.gather(
                2, block[:, None, None, None].expand(-1, up.shape[1], 1, up.shape[3])
            ).squeeze(2)
            return self.out(join_heads(torch.einsum("bhls,hvs->bhlv", o, mine)))
        z = o.unflatten(1, (self.groups, self.heads))
        return self.out(join_heads(torch.einsum("bghls,hvgs->bhlv", z, up)))

    @override
    def shard(self, rank: int, ranks: int) -> Self:
        """Step 17: ranks / g devices per group split its heads; fewer ranks take whole groups.

        Raises:
            InputError: an exchange between slices, or exact prefill, which is split another way.
        """
        if self.pd_sep or not (self.local_norm and self.local_softmax):
            raise InputError(
                "shard: exact prefill splits heads and exact norms or softmaxes exchange numbers; "
                "shard for_decoding() of one with local norm and softmax for decoding, and the MLA "
                "that it was made from for prefill."
            )
        part = self._of_groups(self.groups_of(rank, ranks))
        per_group = max(1, ranks // self.groups)
        mine = share(part.heads, rank % per_group, per_group, "heads")
        made = MLAProjection.shard(part, rank % per_group, per_group)
        assert made.heads == mine.stop - mine.start
        if made.out.bias is not None and rank:
            made.out.bias.data.zero_()
        return made

    def for_decoding(self) -> Self:
        """A copy without exact prefill: what devices that only decode are made of (step 20).

        A rank's part of it goes on from the rank's slices of the cache that an exact prefill left:

            entries = prefill.entries["latent"][:, projection.groups_of(rank, ranks)]
        """
        made = deepcopy(self)
        made.pd_sep, made.recipe = False, replace(self.recipe, pd_sep=False)
        return made

    def groups_of(self, rank: int, ranks: int) -> slice:
        """The slices of the latent that a rank has, see `shard`.

        Raises:
            InputError: the groups don't go evenly over the ranks.
        """
        if ranks < 1 or (ranks % self.groups and self.groups % ranks):
            raise InputError(f"shard: {self.groups} groups don't go evenly over {ranks} ranks.")
        per_group = max(1, ranks // self.groups)
        return share(self.groups, rank // per_group, max(1, ranks // per_group), "groups")

    def _of_groups(self, groups: slice) -> Self:
        """Only some of the slices, and in GLA only their heads."""
        part = deepcopy(self)
        columns = slice(groups.start * self.slice_width, groups.stop * self.slice_width)
        keep = torch.cat(
            (torch.arange(self.latent)[columns], self.latent + torch.arange(self.rope_dim))
        )
        down = self.kv_down
        part.kv_down = nn.Linear(down.in_features, len(keep), down.bias is not None)
        part.kv_down.weight.data = down.weight.detach()[keep].clone()
        if down.bias is not None:
            part.kv_down.bias.data = down.bias.detach()[keep].clone()
        part.groups, part.latent = groups.stop - groups.start, columns.stop - columns.start
        part.alpha, part.mu = self.alpha[groups].clone(), self.mu[groups].clone()
        part.kv_up = columns_of(self.kv_up, columns, 1, first=True)
        if self.blocks:
            size = self.heads // self.groups
            mine = slice(groups.start * size, groups.stop * size)
            part.heads = mine.stop - mine.start
            part.q_up = rows_of(self.q_up, mine, self.head_dim + self.rope_dim)
            part.kv_up = rows_of(part.kv_up, mine, self.head_dim + self.value_dim)
            part.out = columns_of(self.out, mine, self.value_dim, first=groups.start == 0)
        return part
