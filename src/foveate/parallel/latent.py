"""Latent attention over ranks: TPLA and GLA split the latent, plain MLA splits heads.

    part = latent_part(model, group)        # on every rank of the group; the model is whole before

Each rank then runs the model as ever, on the same tokens; what differs is in the attention layers:

    form    decoding                                              cached for a token on a rank
    "mla"   h / k heads on the whole latent                       r + d_r
    "tpla"  all heads on its slice of the latent; with k > g      r / g + d_r
            ranks, k / g ranks of a slice split the heads
    "gla"   head block j on slice j                               r / g + d_r

and one all-reduce of y (D numbers for a token) closes the layer; an exact norm sums one more. An
exact softmax would sum h scores a key and is refused. Prefill of "tpla" and "gla" runs in MLA's
form (`pd_sep`): heads are split over all ranks, norm and softmax are those of the whole latent, and
each rank keeps its slice of chat', whatever its heads. A later chunk of a prompt first gathers the
slices of those before. Only decoding sees an approximation. No gradients: a part is for inference.

The basis (PCA, Hadamard, identity), alpha and mu come with the model, from
`foveate.models.to_tpla`.
Tang et al. 2025, arXiv 2508.15881, sections 3 and 4.
"""

from __future__ import annotations

from copy import copy, deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from foveate.methods.tpla import MLA, MLAProjection, TPLAProjection
from foveate.models.causal_lm import FoveateForCausalLM
from foveate.nn import Attention, LayerOutput
from foveate.ops import Mask
from foveate.ops.errors import InputError
from foveate.parts.context import Context
from foveate.parts.kv_cache import TokenCache
from foveate.parts.norm import RMSNorm
from foveate.parts.projection import Sizes
from foveate.parts.state import StateCache


@dataclass
class Traffic:
    """Numbers that a rank puts into all-reduces and gathers, by what they are."""

    summed: int = 0
    gathered: int = 0

    def reset(self) -> None:
        """Count again from 0."""
        self.summed = self.gathered = 0


class LatentPart(nn.Module):
    """One rank's part of a latent attention layer; stands where the whole layer stood.

    Args:
        layer: an attention over MLA, or over TPLA or GLA with a local softmax and any norm.
        group: the ranks that share it; None is the default group.

    Raises:
        InputError: another projection, or heads or slices don't split over the ranks.
    """

    def __init__(self, layer: Attention, group: distributed.ProcessGroup | None = None) -> None:
        super().__init__()
        p = layer.projection
        if not isinstance(p, MLAProjection):
            raise InputError(
                f"LatentPart: the layer's projection is {type(p).__name__}; expected 'mla', or "
                "'tpla' made by foveate.models.to_tpla."
            )
        if layer.sinks is not None:
            raise InputError(
                "LatentPart: the layer has sink logits or a gate of all heads, which aren't split "
                "over ranks; build it without them."
            )
        rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
        if rank < 0:
            raise InputError("LatentPart: this rank isn't in the group.")
        self.group, self.dim, self.ranks, self.rank = group, layer.dim, ranks, rank
        self.traffic = Traffic()
        self.prefill: Attention | None = None
        self.slices = slice(0, 1)
        if isinstance(p, TPLAProjection):
            self.slices, self.groups, self.width = p.groups_of(rank, ranks), p.groups, p.slice_width
            self.decode = _with(layer, self._slice_of(p))
            if p.pd_sep:
                self.prefill = _with(layer, whole_latent(p).shard(rank, ranks))
        else:
            self.decode = _with(layer, p.shard(rank, ranks))

    def _slice_of(self, p: TPLAProjection) -> TPLAProjection:
        """The rank's slices, with a norm of their own, or the whole latent's."""
        if p.local_norm:
            return p.for_decoding().shard(self.rank, self.ranks)
        local = deepcopy(p)
        local.local_norm = True
        made = local.for_decoding().shard(self.rank, self.ranks)
        made.local_norm, made.over_ranks = False, self._over_slices
        return made

    def _over_slices(self, mine: Tensor) -> Tensor:
        """The sum of a number for each token over all slices; several ranks may have the same."""
        copies = max(1, self.ranks // self.groups)
        return self._sum(mine / copies)

    def new_cache(self, capacity: int = 0) -> TokenCache:
        """An empty cache of what this rank keeps."""
        made = self.decode.new_cache(capacity)
        assert isinstance(made, TokenCache)
        return made

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        *,
        mask: Mask | None = None,
        cache: TokenCache | StateCache | None = None,
        ctx: Context | None = None,
    ) -> LayerOutput:
        """As `foveate.Attention`, with the same x on every rank; y is the sum over ranks."""
        past = 0 if cache is None else len(cache)
        decoding = bool(past) and x.shape[1] == 1
        if ctx is not None:
            decoding = ctx.phase == "decode"
        if self.prefill is None or decoding:
            out = self.decode(x, x_kv, mask=mask, cache=cache, ctx=ctx)
        else:
            out = self._in_mla_form(self.prefill, x, x_kv, mask, cache, ctx)
        return LayerOutput(self._sum(out.y), cache, out.aux)

    def _in_mla_form(
        self,
        prefill: Attention,
        x: Tensor,
        x_kv: Tensor | None,
        mask: Mask | None,
        cache: TokenCache | StateCache | None,
        ctx: Context | None,
    ) -> LayerOutput:
        """Step 19: exact MLA on this rank's heads; the rank's slice of chat' goes to its cache."""
        whole = prefill.new_cache()
        assert isinstance(whole, TokenCache)
        past = 0 if cache is None else len(cache)
        if isinstance(cache, TokenCache) and past:
            whole.append({"latent": self._gathered(cache.entries["latent"])})
        out = prefill(x, x_kv, mask=mask, cache=whole, ctx=ctx)
        if isinstance(cache, TokenCache):
            cache.append({"latent": self._sliced(whole.entries["latent"][:, :, past:])})
        return out

    def _sliced(self, held: Tensor) -> Tensor:
        """Cut chat' and k_pe (B, 1, n, r + d_r): this rank's slices (B, g', n, r / g + d_r)."""
        latent, k_pe = held.tensor_split([self.groups * self.width], -1)
        mine = latent[:, 0].unflatten(-1, (self.groups, -1)).transpose(1, 2)[:, self.slices]
        return torch.cat((mine, k_pe.expand(-1, mine.shape[1], -1, -1)), -1)

    def _gathered(self, held: Tensor) -> Tensor:
        """The inverse of `_sliced`, from all ranks."""
        mine = held[..., : self.width].contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        distributed.all_gather(parts, mine, group=self.group)
        self.traffic.gathered += mine.numel()
        step = max(1, self.ranks // self.groups)  # ranks of one slice hold the same
        latent = torch.cat(parts[::step], 1).transpose(1, 2).flatten(2)
        return torch.cat((latent[:, None], held[:, :1, :, self.width :]), -1)

    def _sum(self, y: Tensor) -> Tensor:
        """Step 16, for y; there is no weighting: each rank supplies its part of the value."""
        if y.requires_grad:
            raise InputError(
                "LatentPart: gradients don't pass the sum over ranks; call it under "
                "torch.no_grad(), and train the whole model."
            )
        y = y.contiguous()
        distributed.all_reduce(y, group=self.group)
        self.traffic.summed += y.numel()
        return y


def whole_latent(tpla: TPLAProjection) -> MLAProjection:
    """The exact MLA with a TPLA's weights: its gain is 1, its latent in the TPLA's basis."""
    down, out = tpla.kv_down, tpla.out
    recipe = MLA(
        latent=tpla.latent,
        rope_dim=tpla.rope_dim,
        query_rank=None if tpla.q_down is None else tpla.q_down.out_features,
        head_dim=tpla.head_dim,
        value_dim=tpla.value_dim,
        mscale=tpla.mscale,
        eps=tpla.eps,
    )
    sizes = Sizes(
        out.out_features,
        tpla.heads,
        tpla.head_dim,
        down.in_features,
        down.bias is not None,
        out.bias is not None,
    )
    made = recipe.build(sizes).to(out.weight.device, out.weight.dtype)
    state = {k: v for k, v in tpla.state_dict().items() if k not in ("alpha", "mu")}
    missing, unknown = made.load_state_dict(state, strict=False)
    assert missing == ["kv_norm.weight"]
    assert not unknown
    assert isinstance(made.kv_norm, RMSNorm)
    nn.init.ones_(made.kv_norm.weight)
    return made.train(tpla.training)


def _with(layer: Attention, projection: MLAProjection) -> Attention:
    """The layer, with another projection; attention and rotary positions are shared."""
    made = copy(layer)
    made._modules = dict(layer._modules)
    made.projection = projection
    return made


def latent_part(
    model: FoveateForCausalLM, group: distributed.ProcessGroup | None = None
) -> FoveateForCausalLM:
    """A copy of a model in which every latent attention is this rank's part.

    "mla" layers become plain MLA-TP; "tpla" layers, also with heads="blocks" (GLA), are split by
    slices. Everything else stays whole on every rank.

    Raises:
        InputError: no layer has a latent, or one doesn't split over the group.
    """
    made = deepcopy(model)
    found = 0
    for block in made.model.blocks:
        if isinstance(block.attention, Attention) and isinstance(
            block.attention.projection, MLAProjection
        ):
            block.attention = LatentPart(block.attention, group)  # type: ignore[assignment]
            found += 1
    if not found:
        raise InputError("latent_part: no layer of this model has a latent ('mla' or 'tpla').")
    return made


def traffic(model: nn.Module) -> Traffic:
    """What all layers of a part have moved, together."""
    parts = [m for m in model.modules() if isinstance(m, LatentPart)]
    return Traffic(sum(p.traffic.summed for p in parts), sum(p.traffic.gathered for p in parts))
