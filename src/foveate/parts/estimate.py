"""Where attention goes, from a few of its rows: sums per key and per distance.

For a block of consecutive queries the rows of P are formed whole, a few at a time, and added up
along columns (verticals) and diagonals (slashes). Nothing of size Lq x Lkv is held.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops import attention, window
from foveate.parts.attention import EVERYTHING
from foveate.parts.context import Context
from foveate.parts.form import is_causal_or_full
from foveate.parts.tokens import Tokens

_BUDGET = 1 << 21  # weights held at once


class Sums(NamedTuple):
    """vertical (B, Hq, Lkv): weight of each key; slash (B, Hq, Lkv): weight at each i - j >= 0."""

    vertical: Tensor
    slash: Tensor


def last_row_sums(q: Tensor, k: Tensor, ctx: Context, tokens: Tokens, last: int) -> Sums:
    """Attention of each sequence's last real queries, summed per key and per distance.

    Ahat = softmax(scale * q[last rows] k^T) within `ctx.mask`, with its softcap and bias; then
    c_j = sum_r Ahat[r, j] and o_t = sum_r Ahat[r, i_r - t] (MInference, arXiv 2407.02490,
    algorithm 2). Padded queries and keys count nothing.

    Args:
        q: (B, Hq, Lq, D).
        k: (B, Hkv, Lkv, D).
        ctx: mask, scale, softcap and bias.
        tokens: of this call; its positions must be regular.
        last: how many queries.

    Returns:
        The sums, in fp32 (float64 for float64 inputs).
    """
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    group = heads // kv_heads
    work = torch.promote_types(q.dtype, torch.float32)
    scale = dim**-0.5 if ctx.scale is None else ctx.scale
    count = min(last, q_len)
    vertical = torch.zeros(batch, heads, kv_len, dtype=work, device=q.device)
    # Places in the sheared sum: distance t stands at `top - t`.
    slash = torch.zeros(batch, heads, kv_len + count - 1, dtype=work, device=q.device)
    row_step = max(1, _BUDGET // max(1, group * kv_len))
    head_step = max(1, _BUDGET // max(1, group * kv_len * count))
    found = []
    for b in range(batch):
        t = b if len(tokens.shift) > 1 else 0
        end = int(tokens.q_real[t].nonzero()[-1]) + 1
        rows = torch.arange(max(0, end - count), end, device=q.device)
        for part in rows.split(row_step):
            hidden, span, cut = _hidden(ctx, tokens, part, b, heads)
            if span.start == span.stop:
                continue
            for g in range(0, kv_heads, head_step):
                mine = slice(g * group, min(g + head_step, kv_heads) * group)
                some = (q[b, mine][:, part].to(work) * scale).reshape(-1, group * len(part), dim)
                weights = some @ k[b, g : g + head_step, span].to(work).mT
                weights = weights.reshape(-1, len(part), weights.shape[-1])
                if ctx.softcap is not None:
                    weights = weights.div_(ctx.softcap).tanh_().mul_(ctx.softcap)
                if ctx.bias is not None:
                    weights = weights + _rows_of(ctx.bias, b, mine, part, heads, span)
                weights[..., cut].masked_fill_(
                    hidden[mine] if len(hidden) > 1 else hidden, -torch.inf
                )
                top = weights.amax(-1, keepdim=True).clamp_min(torch.finfo(work).min)
                weights = weights.sub_(top).exp_()
                total = weights.sum(-1, keepdim=True)
                weights.div_(total.masked_fill(total == 0, 1.0))
                vertical[b, mine, span] += weights.sum(1)
                at = end - 1 - int(part[0]) + span.start
                for r, row in enumerate(weights.unbind(1)):
                    slash[b, mine, at - r : at - r + row.shape[1]] += row
                del weights, row  # so that the next ones take their memory
        found.append(_by_distance(slash[b], end - 1 + int(tokens.shift[t]), kv_len))
    return Sums(vertical, torch.stack(found))


def _hidden(
    ctx: Context, tokens: Tokens, rows: Tensor, b: int, heads: int
) -> tuple[Tensor, slice, slice]:
    """What the rows don't see; rows that aren't real see nothing.

    Returns:
        hidden (1 or Hq, n, c); the span of keys outside of which no row sees anything; and which c
        keys of the span `hidden` tells of, the others being seen by all rows.
    """
    mask = EVERYTHING if ctx.mask is None else ctx.mask
    t = b if len(tokens.shift) > 1 else 0
    q = tokens.q_pos[t if len(tokens.q_pos) > 1 else 0][rows][:, None]
    k = tokens.k_pos[t if len(tokens.k_pos) > 1 else 0][None]
    groups = mask.groups()[1]
    seen = torch.stack(
        [mask._element(q, k, b, h).expand(len(rows), k.shape[1]) for h in range(groups)]
    )
    seen &= tokens.q_real[t][rows][:, None]
    span = _extent(seen.flatten(0, 1).any(0))
    hidden = ~seen[..., span]
    cut = _extent(hidden.flatten(0, 1).any(0))
    hidden = hidden[..., cut]
    return (hidden if groups == 1 else hidden.repeat_interleave(heads // groups, 0)), span, cut


def _extent(flags: Tensor) -> slice:
    """From the first to the last that is set."""
    some = flags.nonzero()[:, 0]
    return slice(int(some[0]), int(some[-1]) + 1) if len(some) else slice(0, 0)


def _rows_of(bias: Tensor, b: int, heads: slice, rows: Tensor, count: int, keys: slice) -> Tensor:
    """Bias, broadcastable to (B, Hq, Lq, Lkv), for some heads, rows and keys of one sequence."""
    bias = bias[(None,) * (4 - bias.dim())]
    one = bias[b if bias.shape[0] > 1 else 0].expand(count, -1, -1)[heads]
    one = one[:, rows] if one.shape[1] > 1 else one
    return one[..., keys] if one.shape[2] > 1 else one


def _by_distance(sheared: Tensor, top: int, kv_len: int) -> Tensor:
    """(H, W) with distance t at place top - t, to (H, Lkv) with distance t at t."""
    places = top - torch.arange(kv_len, device=sheared.device)
    inside = (places >= 0) & (places < sheared.shape[1])
    return sheared[:, places.clamp(0, sheared.shape[1] - 1)] * inside


def received(
    q: Tensor, k: Tensor, lse: Tensor, ctx: Context, tokens: Tokens, last: int | None = None
) -> Tensor:
    """Weight that each key receives, (B, Hq, Lkv), from all real queries or each row's last.

    sum_i exp(s_ij - lse_i), in fp32 (float64 for float64 inputs). For all queries of causal
    attention the core op does it: that sum is the exp of the lse of keys that attend to queries,
    with -lse_i as a bias. Otherwise a few rows at a time, without the keys that none of them sees.

    Args:
        q: (B, Hq, Lq, D).
        k: (B, Hkv, Lkv, D).
        lse: (B, Hq, Lq), as the core op returned it for this call.
        ctx: mask, scale, softcap and bias of it.
        tokens: of it.
        last: how many queries; None is all.
    """
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    group = heads // kv_heads
    work = torch.promote_types(q.dtype, torch.float32)
    scale = dim**-0.5 if ctx.scale is None else ctx.scale
    sums = torch.zeros(batch, heads, kv_len, dtype=work, device=q.device)
    if last is None and ctx.bias is None and tokens.causal and is_causal_or_full(ctx, tokens):
        return _turned(q, k, lse, ctx, tokens).to(work)
    step = max(1, _BUDGET // max(1, group * kv_len))
    for b in range(batch):
        t = b if len(tokens.shift) > 1 else 0
        end = int(tokens.q_real[t].nonzero()[-1]) + 1
        first = 0 if last is None else max(0, end - last)
        for rows in torch.arange(first, end, device=q.device).split(step):
            hidden, span, cut = _hidden(ctx, tokens, rows, b, heads)
            if span.start == span.stop:
                continue
            for g in range(kv_heads):
                mine = slice(g * group, (g + 1) * group)
                some = (q[b, mine][:, rows].to(work) * scale).flatten(0, 1)
                weights = (some @ k[b, g, span].to(work).mT).unflatten(0, (group, -1))
                if ctx.softcap is not None:
                    weights = weights.div_(ctx.softcap).tanh_().mul_(ctx.softcap)
                if ctx.bias is not None:
                    weights = weights + _rows_of(ctx.bias, b, mine, rows, heads, span)
                own = lse[b, mine][:, rows].to(work)
                weights.sub_(own.masked_fill(own == -torch.inf, 0.0)[..., None])
                weights[..., cut].masked_fill_(
                    hidden[mine] if len(hidden) > 1 else hidden, -torch.inf
                )
                sums[b, mine, span] += weights.exp_().sum(1)
    return sums


def _turned(q: Tensor, k: Tensor, lse: Tensor, ctx: Context, tokens: Tokens) -> Tensor:
    """What keys receive from all queries that stand at or behind them: (B, Hq, Lkv)."""
    blind = (lse == -torch.inf) | ~tokens.q_real[:, None]
    found = attention(
        k.repeat_interleave(q.shape[1] // k.shape[1], 1),
        q,
        q.new_zeros(*q.shape[:3], 1),
        window(0, -1),
        bias=(-lse).masked_fill(blind, -torch.inf)[:, :, None],
        scale=ctx.scale,
        softcap=ctx.softcap,
    )
    return found.lse.exp() * tokens.k_real[:, None]
