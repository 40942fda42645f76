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


@torch.no_grad()
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
    # One room for the weights of all steps: memory that is new costs more than writing it.
    n = min(count, row_step)
    most = min(heads, head_step * group) * n * (kv_len + n - 1)
    room = torch.empty(n - 1 + most, dtype=work, device=q.device)
    found = []
    for b in range(batch):
        t = b if len(tokens.shift) > 1 else 0
        end = int(tokens.q_real[t].nonzero()[-1]) + 1
        rows = torch.arange(max(0, end - count), end, device=q.device)
        for part in rows.split(row_step):
            hidden, span, cut = _hidden(ctx, tokens, part, b, heads)
            if span.start == span.stop:
                continue
            at = end - 1 - int(part[-1]) + span.start
            for g in range(0, kv_heads, head_step):
                mine = slice(g * group, min(g + head_step, kv_heads) * group)
                some = q[b, mine][:, part].to(work) * scale
                keys = k[b, g : g + head_step, span].to(work)
                bias = None if ctx.bias is None else _rows_of(ctx.bias, b, mine, part, heads, span)
                unseen = hidden[mine] if len(hidden) > 1 else hidden
                sums = _sums(some, keys, unseen, cut, ctx.softcap, bias, room)
                vertical[b, mine, span] += sums.vertical
                slash[b, mine, at : at + sums.slash.shape[1]] += sums.slash
        found.append(_by_distance(slash[b], end - 1 + int(tokens.shift[t]), kv_len))
    return Sums(vertical, torch.stack(found))


def _sums(
    q: Tensor,
    k: Tensor,
    hidden: Tensor,
    cut: slice,
    softcap: float | None,
    bias: Tensor | None,
    room: Tensor,
) -> Sums:
    """Weights of n consecutive queries on c keys, summed along columns and along diagonals.

    Args:
        q: (H, n, D), scaled.
        k: (G, c, D); each is of H // G consecutive heads.
        hidden: (H or 1, n, ...) what isn't seen of the keys `cut`.
        cut: some of the c keys.
        softcap: of the scores.
        bias: broadcastable to (H, n, c), or None.
        room: where the weights are made; n - 1 + H * n * (c + n - 1) numbers or more.

    Returns:
        vertical (H, c); and slash (H, c + n - 1), where key j of query i counts at j + n - 1 - i.
    """
    heads, n, dim = q.shape
    count = k.shape[1]
    width = count + n - 1
    # One row after the other, n - 1 zeros before each: read with rows that are longer by one, each
    # begins one key later than the row before, and what stands in a column is a diagonal.
    flat = room[: n - 1 + heads * n * width]
    flat[: n - 1] = 0.0
    weights = flat[n - 1 :].view(heads, n, width)
    weights[..., count:] = -torch.inf
    for one, key, out in zip(q.reshape(len(k), -1, dim), k, weights.view(len(k), -1, width)):
        torch.mm(one, key.mT, out=out[:, :count])
    scores = weights[..., :count]
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores.add_(bias)
    scores[..., cut].masked_fill_(hidden, -torch.inf)
    torch.softmax(weights, -1, out=weights)
    blind = weights[..., :1].isnan()
    if blind.any():  # rows that see nothing
        weights.masked_fill_(blind, 0.0)
    sheared = flat.as_strided(weights.shape, (n * width, width + 1, 1))
    return Sums(weights.sum(1)[:, :count], sheared.sum(1))


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
