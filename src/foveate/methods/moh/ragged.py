"""Ragged execution: for each head only the tokens that chose it, as a layout of the core op.

The tokens of each (batch entry, head) are listed in order and cut into tiles; each tile visits the
key tiles from the first one that is no padding up to its last token, by position. A pair that isn't
listed costs nothing and its output is 0: exactly what computing all and masking gives
(arXiv 2410.11842).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops import Layout
from foveate.ops.errors import InputError
from foveate.ops.layout.core import FULL, KEY_RANGE
from foveate.ops.masks.algebra import And
from foveate.ops.masks.base import Mask, positions
from foveate.ops.masks.fixed import padding
from foveate.parts.attention import TILE, Pattern, remember
from foveate.parts.context import Context


@dataclass(frozen=True, eq=False)
class Ragged(Pattern):
    """Full attention of the (token, head) pairs that are active; 0 for the others.

    Attributes:
        active: (B, H, Lq) bool.
        ranges: as `key_ranges` gives them.
        kv_masked: as in `ragged_layout`.
    """

    active: Tensor
    ranges: Tensor
    kv_masked: bool = False

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        """The mask is in the ranges already."""
        return ragged_layout(self.active, k.shape[2], self.ranges, kv_masked=self.kv_masked)


def key_ranges(ctx: Context, q_len: int, kv_len: int, device: torch.device) -> Tensor | None:
    """Which keys each query may see, where that is one range for each: from, up to (B or 1, Lq, 2).

    So it is without a mask, and under causal() and padding(...), alone or together, in positions
    that count up by one. None is another mask.
    """
    parts: tuple[Mask | None, ...] = ctx.mask.parts if isinstance(ctx.mask, And) else (ctx.mask,)
    lengths: tuple[int, ...] | None = None
    causal = False
    for part in parts:
        if part is None:
            continue
        if part.spec == "causal()":
            causal = True
        elif isinstance(part, padding) and lengths is None:
            lengths = part.lengths
        else:
            return None

    def build() -> Tensor | None:
        if ctx.mask is not None:
            ctx.mask._check(q_len, kv_len)
        q_pos, k_pos = positions(q_len, kv_len, ctx.q_positions, ctx.kv_positions, device)
        if not bool((k_pos.diff() == 1).all()):
            return None
        zero = k_pos[:, :1]  # (B or 1, 1) position of the first key
        start, end = torch.zeros_like(q_pos - zero), torch.full_like(q_pos - zero, kv_len)
        if causal:
            end = torch.minimum(end, q_pos - zero + 1)
        if lengths is not None:
            real = torch.tensor(lengths, device=device)[:, None]
            end = torch.minimum(end, real - zero)
            start = torch.maximum(start, -zero).expand_as(end)
        return torch.stack((start, torch.maximum(start, end)), -1)

    return remember(ctx, (key_ranges, ctx.mask, q_len, kv_len, device), build)


@torch.no_grad()
def ragged_layout(
    active: Tensor, kv_len: int, ranges: Tensor, *, kv_masked: bool = False
) -> Layout:
    """The layout over (token, head) pairs that are active.

    Args:
        active: (B, H, Lq) bool.
        kv_len: Lkv.
        ranges: (B or 1, Lq, 2), the keys that a query may see: from, up to.
        kv_masked: keys of a head vanish too, where the token didn't choose it. It isn't what MoH's
            models compute; it is how the paper timed them. Lq must be Lkv then, and all ranges
            begin with the first key.

    Raises:
        InputError: shapes that don't fit.
    """
    if active.dim() != 3 or active.dtype != torch.bool:
        raise InputError(
            f"ragged_layout(active): expected bool (B, H, Lq), got {active.dtype} of shape "
            f"{tuple(active.shape)}."
        )
    if kv_masked and active.shape[2] != kv_len:
        raise InputError(
            f"ragged_layout(kv_masked=True): expected as many keys as queries, got {kv_len} and "
            f"{active.shape[2]}."
        )
    batch, heads, q_len = active.shape
    device = active.device
    counts = active.sum(-1)
    most = max(1, int(counts.max()) if counts.numel() else 1)
    tile = min(TILE, -(-most // 8) * 8)
    places = torch.arange(most, device=device)
    order = active.logical_not().byte().sort(dim=-1, stable=True).indices[..., :most]
    listed = places < counts[..., None]
    index = order.masked_fill(~listed, -1)
    at = order[..., None].expand(-1, -1, -1, 2)
    seen = ranges[:, None].expand(batch, heads, -1, -1).gather(2, at)
    if kv_masked:  # virtual keys are the active ones; so many of them lie before the range's end
        before = torch.cat((torch.zeros_like(counts)[..., None], active.cumsum(-1)), -1)
        seen = before.gather(2, seen.flatten(2)).view_as(seen)
    start, end = seen.masked_fill(~listed[..., None], 0).unbind(-1)
    tiles = -(-most // tile)
    rows = torch.zeros(batch, heads, tiles * tile, dtype=torch.bool, device=device)
    rows[..., :most] = listed
    rows = rows.unflatten(-1, (tiles, tile))
    nothing = torch.iinfo(torch.int64).max

    def by_tile(x: Tensor, fill: int) -> Tensor:
        """(B, H, tiles, tile) of rows that see something; `fill` for the others."""
        full = x.new_full((batch, heads, tiles * tile), fill)
        full[..., :most] = x.masked_fill(start >= end, fill)
        return full.unflatten(-1, (tiles, tile))

    begin = by_tile(start, nothing).amin(-1).clamp(max=kv_len) // TILE
    visits = (-(-by_tile(end, 0).amax(-1) // TILE) - begin).clamp(min=0)
    # A tile of keys is full where every listed row of the tile sees all of it.
    full_from = by_tile(start, nothing).masked_fill(~rows, 0).amax(-1)
    full_to = by_tile(end, 0).masked_fill(~rows, nothing).amin(-1)
    offsets = torch.cat((visits.new_zeros(1), visits.reshape(-1).cumsum(0)))
    entry = torch.repeat_interleave(torch.arange(visits.numel(), device=device), visits.reshape(-1))
    cols = torch.arange(len(entry), device=device) - offsets[entry] + begin.reshape(-1)[entry]
    whole = (cols * TILE >= full_from.reshape(-1)[entry]) & (
        (cols + 1) * TILE <= full_to.reshape(-1)[entry]
    )
    starts = offsets[:-1].reshape(batch, heads, tiles)
    ends = offsets[1:].reshape(batch, heads, tiles)
    return Layout(
        q_len=q_len,
        kv_len=kv_len,
        q_tile=tile,
        kv_tile=TILE,
        ptr=torch.cat((starts[..., :1], ends), -1),
        cols=cols.int(),
        kinds=torch.where(whole, FULL, KEY_RANGE).int(),
        bits=torch.zeros(0, TILE, tile // 8, dtype=torch.uint8, device=device),
        q_index=index.int(),
        kv_index=index.int() if kv_masked else None,
        key_range=torch.stack((start, end), -1).int(),
    )
