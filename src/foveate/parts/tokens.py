"""Which tokens of a call are real, and where queries stand among the keys.

Padding is told by the mask alone: a token is real if it may see itself. A key without a query (of a
cache) is real if the first or the last real query sees it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops import Mask
from foveate.ops.masks.base import positions
from foveate.parts.attention import EVERYTHING, remember
from foveate.parts.context import Context


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a call; B' is 1 where all batch entries are alike.

    Attributes:
        q_pos: (1 or B', Lq) positions.
        k_pos: (1 or B', Lkv) positions.
        shift: (B',) index of the first query among the keys, which may lie before them.
        q_real: (B', Lq) bool.
        k_real: (B', Lkv) bool; under a causal mask none that comes after the last real query.
        causal: whether no query sees a later key.
        regular: whether positions count up by one, so that distances are differences of indices.
    """

    q_pos: Tensor
    k_pos: Tensor
    shift: Tensor
    q_real: Tensor
    k_real: Tensor
    causal: bool
    regular: bool


def tokens_of(q: Tensor, k: Tensor, ctx: Context) -> Tokens:
    """The tokens of this call; q (B, Hq, Lq, D), k (B, Hkv, Lkv, D). Kept in `ctx.store`.

    The mask may be for more keys than these: a memory holds the last ones. Whoever takes all tokens
    asks the mask itself whether it fits.
    """
    mask = EVERYTHING if ctx.mask is None else ctx.mask
    lengths = (q.shape[2], k.shape[2])

    def build() -> Tokens:
        places = positions(*lengths, ctx.q_positions, ctx.kv_positions, q.device)
        return _tokens(mask, *places)

    return remember(ctx, (tokens_of, mask, lengths, q.device), build)


def queries_that_are(tokens: Tokens) -> Tensor:
    """(B', Lq) bool: the real queries, none in a row of which no key is real.

    Such a row is all padding so far (the first chunk of a prompt that is padded on the left), and
    `q_real` can't tell it from a mask under which no token sees itself. What adds tokens to a state
    asks here.
    """
    return tokens.q_real & tokens.k_real.any(1, keepdim=True)


def _tokens(mask: Mask, q_pos: Tensor, k_pos: Tensor) -> Tokens:
    heads = range(mask.groups()[1])
    batches = max(mask.groups()[0], q_pos.shape[0], k_pos.shape[0])
    q_real, k_real = [], []
    causal = True
    for b in range(batches):
        q = q_pos[b if q_pos.shape[0] > 1 else 0]
        k = k_pos[b if k_pos.shape[0] > 1 else 0]
        own = torch.stack([mask._element(q, q, b, h) for h in heads]).any(0)
        if not bool(own.any()):
            own = torch.ones_like(own)
        known = torch.stack([mask._element(k, k, b, h) for h in heads]).any(0)
        ends = q[own][[0, -1]][:, None]
        for h in heads:
            known = known | mask._element(ends, k[None], b, h).any(0)
        alone = all(_is_causal(mask, q, k, b, h) for h in heads)
        if alone:
            known = known & (k <= q[own].max())
        causal = causal and alone
        q_real.append(own)
        k_real.append(known)
    regular = bool((q_pos.diff() == 1).all()) and bool((k_pos.diff() == 1).all())
    shift = (q_pos[:, 0] - k_pos[:, 0]).expand(batches)
    return Tokens(q_pos, k_pos, shift, torch.stack(q_real), torch.stack(k_real), causal, regular)


def _is_causal(mask: Mask, q: Tensor, k: Tensor, b: int, h: int) -> bool:
    """Whether surely no key of a position after the query's is seen."""
    last = k.max()
    none = mask._tiles(q, q, q + 1, last.expand_as(q), b, h).none
    return bool((none | (q >= last)).all())
