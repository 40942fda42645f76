"""A leader's attention map, and the same map applied to another layer's values.

    A = softmax(Q K^T / sqrt(d) + mask),   o_j = A V_j

Three exact ways to hand A on (Rajabzadeh et al. 2024, arXiv 2409.14595, section 2, doesn't say
which):

    store      A itself, h n^2 numbers; a follower costs one batched product
    recompute  Q and K of the leader; a follower runs the same attention on its own values
    stats      Q, K and the rows' log-sum-exp; p = exp(s - lse), without a maximum or a rescaling

Gradients of all followers add up in the leader's Q and K: the softmax's backward is linear in
dP = sum_j dO_j V_j^T. The lse isn't a constant in "stats": its own gradient is part of it.

Maps are made and applied a block of rows at a time, over the keys that the mask lets the block see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from foveate.ops import AttentionOutput
from foveate.ops.masks.base import positions
from foveate.parts.attention import mask_layout, remember
from foveate.parts.context import Context

ROWS = 128
_TILE = 64


@dataclass(frozen=True)
class Block:
    """Rows of a call, the keys that some of them may see, and which: (Bm, Hm, rows, keys)."""

    rows: slice
    keys: slice
    allowed: Tensor | None


def blocks(q: Tensor, k: Tensor, ctx: Context) -> list[Block]:
    """The rows of a call in blocks; kept in `ctx.store` for the layers of a forward.

    Args:
        q: (B, Hq, Lq, D).
        k: (B, Hkv, Lkv, D).
        ctx: mask and positions.
    """
    plain = ctx.q_positions is None and ctx.kv_positions is None
    if q.shape[2] == 1 and plain and (ctx.mask is None or ctx.mask.spec == "causal()"):
        return [Block(slice(0, 1), slice(0, k.shape[2]), None)]  # the last token sees all
    key = (blocks, ctx.mask, q.shape[2], k.shape[2], q.device)
    return remember(ctx, key, lambda: list(_blocks(q, k, ctx)))


def _blocks(q: Tensor, k: Tensor, ctx: Context) -> Iterator[Block]:
    q_len, kv_len, mask = q.shape[2], k.shape[2], ctx.mask
    if mask is None:
        for start in range(0, q_len, ROWS):
            yield Block(slice(start, min(q_len, start + ROWS)), slice(0, kv_len), None)
        return
    q_pos, k_pos = positions(q_len, kv_len, ctx.q_positions, ctx.kv_positions, q.device)
    if q_len == 1:
        allowed = _allowed(ctx, q_pos, k_pos, q)
        yield Block(slice(0, 1), slice(0, kv_len), allowed)
        return
    layout = mask_layout(mask, q, k, ctx, _TILE)
    tile = layout.entry_rows % layout.q_tiles
    columns = layout.cols.long()
    # An order of tokens that a mask's layout prefers is told by indices; then no range is known.
    plain = layout.q_index is None and layout.kv_index is None and layout.gathered is None
    for start in range(0, q_len, ROWS):
        stop, low, high = min(q_len, start + ROWS), 0, kv_len
        if plain:
            mine = columns[(tile >= start // _TILE) & (tile <= (stop - 1) // _TILE)]
            if not mine.numel():
                yield Block(slice(start, stop), slice(0, 0), None)
                continue
            low, high = int(mine.min()) * _TILE, min(kv_len, (int(mine.max()) + 1) * _TILE)
        allowed = _allowed(ctx, q_pos[:, start:stop], k_pos[:, low:high], q)
        yield Block(slice(start, stop), slice(low, high), allowed)


def _allowed(ctx: Context, q_pos: Tensor, k_pos: Tensor, q: Tensor) -> Tensor | None:
    assert ctx.mask is not None
    batches, heads = ctx.mask.groups()
    batches = max(batches, len(q_pos), len(k_pos))
    rows = []
    for b in range(batches):
        at = q_pos[b if len(q_pos) > 1 else 0][:, None]
        to = k_pos[b if len(k_pos) > 1 else 0][None]
        shape = (at.shape[0], to.shape[1])
        rows.append(
            torch.stack([ctx.mask._element(at, to, b, h).expand(shape) for h in range(heads)])
        )
    allowed = torch.stack(rows).to(q.device)
    return None if bool(allowed.all()) else allowed


def scores(q: Tensor, k: Tensor, block: Block, ctx: Context) -> Tensor:
    """Masked logits of a block, (B, Hq, rows, keys) in fp32 or wider."""
    work = torch.promote_types(q.dtype, torch.float32)
    q, k = q[:, :, block.rows].to(work), k[:, :, block.keys].to(work)
    scale = q.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale
    s = _by_group(q * scale, k.mT)
    if ctx.softcap is not None:
        s = ctx.softcap * torch.tanh(s / ctx.softcap)
    if ctx.bias is not None:
        bias = ctx.bias
        if bias.shape[-2] > 1:
            bias = bias[..., block.rows, :]
        if bias.shape[-1] > 1:
            bias = bias[..., block.keys]
        s = s + bias.to(work)
    if block.allowed is not None:
        allowed = block.allowed
        if allowed.shape[1] not in (1, s.shape[1]):
            allowed = allowed.repeat_interleave(s.shape[1] // allowed.shape[1], 1)
        s = s.masked_fill(~allowed, -torch.inf)
    return s


def from_lse(s: Tensor, lse: Tensor) -> Tensor:
    """P = exp(s - lse), zeros in rows that see nothing."""
    blind = lse == -torch.inf
    s = s.masked_fill(blind[..., None], -torch.inf)
    return torch.exp(s - lse.masked_fill(blind, 0.0)[..., None])


def applied(p: Tensor, v: Tensor) -> Tensor:
    """P (B, Hq, rows, keys) on the values of those keys (B, Hkv, keys, Dv)."""
    return _by_group(p, v.to(p.dtype))


def _by_group(x: Tensor, y: Tensor) -> Tensor:
    """Products of x (B, Hq, n, m) and y (B, Hkv, m, w): a group's heads are rows of one."""
    heads, rows = x.shape[1:3]
    folded = x.reshape(x.shape[0], y.shape[1], heads // y.shape[1] * rows, x.shape[3])
    return (folded @ y).reshape(x.shape[0], heads, rows, y.shape[3])


@dataclass(frozen=True)
class Stored:
    """A, in blocks of rows."""

    parts: list[tuple[Block, Tensor]]
    lse: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """A v for values (B, Hkv, Lkv, Dv): (B, Hq, Lq, Dv)."""
        if len(self.parts) == 1:
            block, p = self.parts[0]
            return applied(p, v[:, :, block.keys]).to(v.dtype)
        out = [applied(p, v[:, :, block.keys]) for block, p in self.parts]
        return torch.cat(out, 2).to(v.dtype)

    @property
    def numbers(self) -> int:
        """Numbers that are held."""
        return sum(p.numel() for _, p in self.parts)


def stored(q: Tensor, k: Tensor, ctx: Context) -> Stored:
    """The map of a call, dropout applied: what falls out of it falls out in every follower."""
    parts, sums = [], []
    for block in blocks(q, k, ctx):
        s = scores(q, k, block, ctx)
        blind = block.allowed is not None or ctx.bias is not None or not s.shape[-1]
        lse = _logsumexp(s) if blind else s.logsumexp(-1)
        if ctx.sink_logits is not None:
            lse = torch.logaddexp(lse, ctx.sink_logits.to(lse.dtype)[:, None])
        p = from_lse(s, lse) if blind else torch.exp(s - lse[..., None])
        if ctx.dropout:
            p = functional.dropout(p, ctx.dropout)
        parts.append((block, p))
        sums.append(lse)
    return Stored(parts, torch.cat(sums, 2))


def _logsumexp(s: Tensor) -> Tensor:
    """-inf with a zero gradient for rows that see nothing."""
    if not s.shape[-1]:
        return s.new_full(s.shape[:-1], -torch.inf)
    empty = (s == -torch.inf).all(-1)
    return s.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, -torch.inf)


def from_stats(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, ctx: Context) -> AttentionOutput:
    """The leader's map again, from its rows' log-sum-exp, on values of a follower."""
    out = []
    for block in blocks(q, k, ctx):
        p = from_lse(scores(q, k, block, ctx), lse[:, :, block.rows])
        out.append(applied(p, v[:, :, block.keys]))
    return AttentionOutput(torch.cat(out, 2).to(v.dtype), lse)
