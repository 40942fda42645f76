"""Ragged execution: for each head only the tokens that chose it, as a layout of the core op.

The tokens of each (batch entry, head) are listed in order and cut into tiles; each tile visits the
key tiles up to its last token, by position. A pair that isn't listed costs nothing and its output
is 0: exactly compute-all-and-mask (step 11 of the sheet on arXiv 2410.11842).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops import Layout
from foveate.ops.errors import InputError
from foveate.ops.layout.core import FULL, KEY_RANGE
from foveate.parts.attention import TILE, Pattern
from foveate.parts.context import Context


@dataclass(frozen=True, eq=False)
class Ragged(Pattern):
    """Full attention of the (token, head) pairs that are active; 0 for the others.

    Attributes:
        active: (B, H, Lq) bool.
        kv_masked: as in `ragged_layout`.
    """

    active: Tensor
    kv_masked: bool = False

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        """Causal if there is a mask; it is causal() then."""
        causal = ctx.mask is not None
        return ragged_layout(self.active, k.shape[2], causal=causal, kv_masked=self.kv_masked)


@torch.no_grad()
def ragged_layout(
    active: Tensor, kv_len: int, *, causal: bool = True, kv_masked: bool = False
) -> Layout:
    """The layout over (token, head) pairs that are active.

    Args:
        active: (B, H, Lq) bool; the last query stands with the last key.
        kv_len: Lkv.
        causal: whether a query sees no later key.
        kv_masked: keys of a head vanish too, where the token didn't choose it. It isn't what MoH's
            models compute; it is how the paper timed them. Lq must be Lkv then.

    Raises:
        InputError: shapes that don't fit.
    """
    if active.dim() != 3 or active.dtype != torch.bool:
        raise InputError(
            f"ragged_layout(active): expected bool (B, H, Lq), got {active.dtype} of shape "
            f"{tuple(active.shape)}."
        )
    batch, heads, q_len = active.shape
    if kv_masked and q_len != kv_len:
        raise InputError(
            f"ragged_layout(kv_masked=True): expected as many keys as queries, got {kv_len} and "
            f"{q_len}."
        )
    device = active.device
    counts = active.sum(-1)
    most = max(1, int(counts.max()) if counts.numel() else 1)
    tile = min(TILE, -(-most // 8) * 8)
    places = torch.arange(most, device=device)
    order = active.logical_not().byte().sort(dim=-1, stable=True).indices[..., :most]
    listed = places < counts[..., None]
    index = order.masked_fill(~listed, -1)
    # One past the last (virtual) key that each virtual row sees; 0 where there is no row.
    keys = counts[..., None].expand_as(index) if kv_masked else torch.full_like(index, kv_len)
    end = keys
    if causal:
        end = places.expand_as(index) + 1 if kv_masked else index + (kv_len - q_len) + 1
    end = end.clamp(min=0).masked_fill(~listed, 0)
    tiles = -(-most // tile)
    padded = torch.zeros(batch, heads, tiles * tile, dtype=torch.int64, device=device)
    padded[..., :most] = end
    by_tile = padded.unflatten(-1, (tiles, tile))
    last = by_tile.amax(-1)
    rows = torch.zeros_like(padded, dtype=torch.bool)
    rows[..., :most] = listed
    nothing = torch.iinfo(torch.int64).max
    first = by_tile.masked_fill(~rows.unflatten(-1, (tiles, tile)), nothing).amin(-1)
    visits = -(-last // TILE)
    offsets = torch.cat((visits.new_zeros(1), visits.reshape(-1).cumsum(0)))
    entry = torch.repeat_interleave(torch.arange(visits.numel(), device=device), visits.reshape(-1))
    cols = torch.arange(len(entry), device=device) - offsets[entry]
    whole = (cols + 1) * TILE <= first.reshape(-1)[entry]
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
        key_range=torch.stack((torch.zeros_like(end), end), -1).int(),
    )
