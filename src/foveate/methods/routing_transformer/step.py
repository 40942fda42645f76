"""Decoding: each new token is routed among those before it.

Token t is in cluster c if its score is among the w best of the tokens up to t, so one comparison
with the lowest score that the cluster holds tells. Where it is, it takes the place of that token
and attends to the w members; at w = n / C that is about one cluster for each token and head, so
that a step costs C D + w D. A token that is in no cluster gets 0 from its routing heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.methods.routing_transformer.centroids import layer_norm
from foveate.methods.routing_transformer.clusters import gather_stays, with_memory
from foveate.methods.routing_transformer.members import Stay, streamed
from foveate.methods.routing_transformer.relative import Embeddings, attend
from foveate.methods.routing_transformer.state import RoutingState
from foveate.ops import AttentionOutput, attention, padding
from foveate.ops.errors import InputError
from foveate.parts.context import Context
from foveate.parts.form import is_causal_or_full
from foveate.parts.tokens import tokens_of

if TYPE_CHECKING:
    from foveate.methods.routing_transformer.layer import RoutingAttention


def step(
    layer: RoutingAttention, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: RoutingState
) -> AttentionOutput:
    """The next n tokens; arguments as in `Stateful.step`.

    Raises:
        InputError: a mask that isn't causal.
    """
    past, new = len(state), q.shape[2]
    real = _real_tokens(q, k, ctx, past)
    entries: dict[str, Tensor] = {}
    if layer.local:
        entries["local_key"] = k[:, : layer.local_kv]
        entries["local_value"] = v[:, : layer.local_kv]
    routed_q, routed_k, routed_v = layer.of_routing(q, k, v)
    if layer.routed:
        routed_q = layer_norm(routed_q)
        keys = layer_norm(routed_k) if state.separate else routed_q
        scores, key_scores = layer.scores(routed_q, keys if state.separate else None)
        entries |= {"key": keys, "value": routed_v, "score": _kept(scores, real)}
        if key_scores is not None:
            entries["key_score"] = _kept(key_scores, real)
    kept = state.take(entries)
    outs, lses = [], []
    if layer.local:
        found = _local(layer, q, kept["local_key"], kept["local_value"], ctx)
        outs.append(found.out)
        lses.append(found.lse)
    if layer.routed:
        if past:
            parts = [_one(layer, routed_q[:, :, i : i + 1], kept, state, ctx, past + i)
                     for i in range(new)]  # fmt: skip
            out = torch.cat(parts, 2)
        else:
            out = _prompt(layer, routed_q, kept, state, ctx)
        outs.append(out)
        lses.append(out.new_full(out.shape[:3], torch.nan, dtype=torch.float32))
    lse = torch.cat([x.to(lses[0].dtype) for x in lses], 1)
    return AttentionOutput(torch.cat(outs, 1), lse)


def _real_tokens(q: Tensor, k: Tensor, ctx: Context, past: int) -> Tensor | None:
    """Which of the new tokens are no padding, (B or 1, n); None is all. Refuses other masks."""
    plain = ctx.mask is None and q.shape[2] == 1
    if plain or (ctx.mask is not None and ctx.mask.spec == "causal()"):
        return None
    length = past + q.shape[2]
    every = k.new_empty(1).expand(*k.shape[:2], length, k.shape[3])
    tokens = tokens_of(q, every, ctx)
    if ctx.mask is None or not (tokens.causal and is_causal_or_full(ctx, tokens)):
        raise InputError(
            "routing-transformer decodes under a causal mask (padding aside), one in which every "
            "token sees all before it; expected mask=causal()."
        )
    real = tokens.q_real if ctx.real is None else ctx.real
    return None if bool(real.all()) else real


def _kept(scores: Tensor, real: Tensor | None) -> Tensor:
    """Scores (B, H, C, n) as they are kept, (B, H, n, C): finite, -inf on padding."""
    least = torch.finfo(scores.dtype).min
    scores = torch.where(scores >= least, scores, least).mT
    return scores if real is None else scores.masked_fill(~real[:, None, :, None], -torch.inf)


def _local(
    layer: RoutingAttention, q: Tensor, k: Tensor, v: Tensor, ctx: Context
) -> AttentionOutput:
    """Local heads; of a single new token's keys the last two blocks are read, and no mask made."""
    plain = ctx.mask is None or ctx.mask.spec == "causal()"
    if q.shape[2] > 1 or not plain or ctx.q_positions is not None or ctx.kv_positions is not None:
        return layer.local_attend(q, k, v, ctx)
    first = max(0, (k.shape[2] - 1) // layer.hyper.block - 1) * layer.hyper.block
    return layer.local_attend(q, k[:, :, first:], v[:, :, first:], ctx, all_keys=True)


def _prompt(
    layer: RoutingAttention, q: Tensor, kept: dict[str, Tensor], state: RoutingState, ctx: Context
) -> Tensor:
    """The first tokens, all at once, and who is held after them."""
    assert state.window is not None
    stays = []
    with torch.no_grad():
        for name, of_keys in (("score", False), ("key_score", True)):
            if name in kept:
                scores = kept[name].mT
                stay, held = streamed(scores, state.window, scores > -torch.inf)
                state.hold(held, of_keys)
                stays.append(stay)
        alike = 1
        if q.shape[2] <= state.window and layer.memory is None:
            alike = layer.hyper.clusters
            stays = [Stay(*(x[:, :, :1] for x in stay)) for stay in stays]
        group = q.shape[1] // stays[-1].place.shape[1]
        keys = Stay(*(x.repeat_interleave(group, 1) for x in stays[-1]))
        own = layer.sees_own(not state.separate) or state.window == 1
        found = gather_stays(stays[0], keys, q.shape[2], own=own)
        if layer.memory is not None:
            found = with_memory(found, q.shape[2], layer.hyper.memory)
    return layer.attend(q, kept["key"], kept["value"], found, ctx, alike)


def _one(
    layer: RoutingAttention,
    q: Tensor,
    kept: dict[str, Tensor],
    state: RoutingState,
    ctx: Context,
    t: int,
) -> Tensor:
    """Token t, q (B, H, 1, D) normalised: (B, H, 1, Dv)."""
    assert state.window is not None
    batch, heads = q.shape[:2]
    enters = state.enter(kept["score"][:, :, t], t)
    if state.separate:
        state.enter(kept["key_score"][:, :, t], t, of_keys=True)
    alike = 1
    if t < state.window and layer.memory is None:
        # All tokens so far are in all clusters, which are one and the same.
        alike = layer.hyper.clusters
        enters = enters & (torch.arange(enters.shape[-1], device=q.device) == 0)
    rows = b, h, _ = enters.nonzero(as_tuple=True)
    wide = torch.promote_types(q.dtype, torch.float32)
    zero = q.new_zeros(batch * heads, kept["value"].shape[3], dtype=wide)
    if not len(b):
        return zero.view(batch, heads, 1, -1).to(q.dtype)
    out, saw = _attend(layer, q, kept, state, ctx, rows, t)
    row = b * heads + h
    number = zero[:, 0].index_add(0, row, saw.to(wide))
    total = zero.index_add(0, row, out.to(wide) * saw[:, None])
    eps = layer.hyper.eps / alike
    mean = total / (number + eps if eps else number.clamp_min(1))[:, None]
    return mean.view(batch, heads, 1, -1).to(q.dtype)


def _attend(
    layer: RoutingAttention,
    q: Tensor,
    kept: dict[str, Tensor],
    state: RoutingState,
    ctx: Context,
    rows: tuple[Tensor, ...],
    t: int,
) -> tuple[Tensor, Tensor]:
    """Token t in N clusters, each on its members: (N, Dv), and which saw a key (N,)."""
    b, h, c = rows
    members = state.members(of_keys=True).place
    key_head = h // (q.shape[1] // members.shape[1])
    value_head = h // (q.shape[1] // kept["value"].shape[1])
    place = members[b, key_head, c]  # (N, w)
    total = count = (place >= 0).sum(1)
    if not layer.sees_own(not state.separate) and place.shape[1] > 1:
        last = place.gather(1, (total - 1).clamp_min(0)[:, None])[:, 0]
        count = total - ((last == t) & (total > 1)).long()
    place = place[:, : max(1, int(count.max()))].clamp_min(0)
    k = kept["key"][b[:, None], key_head[:, None], place][:, None]
    v = kept["value"][b[:, None], value_head[:, None], place][:, None]
    q = q[b, h][:, None]
    options = layer.routing_options(q, ctx)
    steps = torch.arange(place.shape[1], device=q.device)
    if layer.relative is not None:
        wide = [x.to(torch.promote_types(x.dtype, torch.float32))[:, :, None] for x in (q, k, v)]
        seen = (steps < count[:, None])[:, None, None, None]
        distance = (total[:, None] - 1 - steps)[:, None, None, None]
        table = Embeddings(*(x[h][:, None] for x in layer.relative))
        scale = float(options["scale"])  # type: ignore[arg-type]
        out = attend(wide[0], wide[1], wide[2], seen, distance, table, scale)
        return out[:, 0, 0, 0], count > 0
    if layer.memory is not None:
        each = layer.hyper.memory
        places = c[:, None] * each + torch.arange(each, device=q.device)
        more = [x[value_head[:, None], places].to(k.dtype)[:, None] for x in layer.memory]
        k, v, count = torch.cat((more[0], k), 2), torch.cat((more[1], v), 2), count + each
    mask = None if bool((count == k.shape[2]).all()) else padding(count)
    out, lse = attention(q, k, v, mask, **options)  # type: ignore[arg-type]
    if ctx.sink_logits is not None:
        logit = ctx.sink_logits[layer.local :][h].to(lse.dtype)[:, None, None]
        out = out * torch.sigmoid(lse - logit)[..., None].to(out.dtype)
    return out[:, 0, 0], count > 0
