"""Which tokens are in which cluster: the w best of each cluster, not each token's best cluster.

Routing Transformer, arXiv 2003.05997, section 4.1: every centroid takes the w tokens that score
highest with it, so that all clusters are of one size; a token may be in several or in none.

Two forms. In *sequence* form (the paper's, in training) a cluster's members are the w best of the
whole sequence, so that a later token may push an earlier one out. In *prefix* form (what decoding
does) token t is a member if it is among the w best of the tokens up to t, and key j is seen from
its own place until a later token pushes it out; nothing depends on what comes after.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.parts.selection import topk_mask


class Held(NamedTuple):
    """The members of each cluster now: place (..., w), rising, -1 behind; score (..., w), fp32."""

    place: Tensor
    score: Tensor


class Stay(NamedTuple):
    """Who was a member at some time, in order: place (..., M), -1 behind; until (..., M).

    Token `place` is a member from its own place to, not with, `until`; the length if to the end.
    """

    place: Tensor
    until: Tensor


def best(scores: Tensor, count: int, real: Tensor | None = None) -> Tensor:
    """The `count` best tokens of each cluster: int64 (..., count), rising, -1 behind the last.

    Of equal scores the earlier token wins, on every device.

    Args:
        scores: (..., n) fp32 or wider.
        count: w.
        real: bool, broadcastable to scores: False is never chosen.
    """
    n = scores.shape[-1]
    ranks = _finite(scores)
    if real is not None:
        ranks = ranks.masked_fill(~real, -torch.inf)
    if count >= n:
        return packed(ranks > -torch.inf, count)
    values, index = ranks.topk(count, -1, sorted=False)
    last = values.amin(-1, keepdim=True)
    if bool(((ranks >= last).sum(-1) == count).all()):  # no ties at the edge
        index = index.masked_fill(values == -torch.inf, n).sort(-1).values
        return index.masked_fill(index == n, -1)
    return packed(topk_mask(ranks, count, real), count)


def _finite(scores: Tensor) -> Tensor:
    """Scores of which -inf is kept for what isn't allowed; NaN is below every number."""
    least = torch.finfo(scores.dtype).min
    return torch.nan_to_num(scores, nan=least, posinf=torch.inf, neginf=least)


def packed(chosen: Tensor, width: int) -> Tensor:
    """The indices that are chosen: bool (..., n) -> int64 (..., width), rising, -1 behind."""
    flat = chosen.reshape(-1, chosen.shape[-1])
    row, col = flat.nonzero(as_tuple=True)
    counts = flat.sum(-1)
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    out = row.new_full((len(flat), width), -1)
    out[row, slot] = col
    return out.view(*chosen.shape[:-1], width)


def streamed(scores: Tensor, count: int, real: Tensor | None = None) -> tuple[Stay, Held]:
    """Members of every prefix at once, and those of the whole.

    Tokens are looked at in runs of doubling length. Those of a run that score above the lowest
    member from before it come in one after the other, in all clusters at the same time: about
    w log2(n / w) times w comparisons for each cluster, unless scores rise all along.

    Args:
        scores: (..., n) fp32 or wider.
        count: w.
        real: as in `best`.
    """
    shape, n = scores.shape[:-1], scores.shape[-1]
    ranks = _finite(scores)
    if real is not None:
        ranks = ranks.masked_fill(~real, -torch.inf)
    ranks = ranks.reshape(-1, n)
    held = Held(
        torch.full((len(ranks), count), -1, device=scores.device),
        ranks.new_full((len(ranks), count), -torch.inf),
    )
    # Where a stay ends, 0 for who never was a member; the column behind is for who doesn't count.
    until = torch.zeros(len(ranks), n + 1, dtype=torch.int64, device=scores.device)
    start = 0
    while start < n:
        end = min(n, start + max(start, count))
        enters = ranks[:, start:end] > held.score.amin(-1, keepdim=True)
        width = int(enters.sum(-1).max()) if len(enters) else 0
        new = packed(enters, width)
        for place in torch.where(new >= 0, new + start, n).unbind(1):
            _come(held, place[:, None], ranks, until)
        start = end
    until = until[:, :n]
    width = max(1, int((until > 0).sum(-1).max())) if until.numel() else 1
    place = packed(until > 0, width)
    stay = until.gather(-1, place.clamp_min(0)) if n else torch.zeros_like(place)
    order = torch.where(held.place < 0, n, held.place).argsort(1)
    now = [x.gather(1, order).view(*shape, count) for x in held]
    return Stay(place.view(*shape, width), stay.view(*shape, width)), Held(*now)


def _come(held: Held, place: Tensor, ranks: Tensor, until: Tensor) -> None:
    """Let a token of each cluster in, if it is among the best: place (R, 1), n for none.

    Writes to `held`, whose members are in no order here, and to `until` (R, n + 1).
    """
    n = ranks.shape[1]
    score = ranks.gather(1, place.clamp_max(n - 1))
    low = held.score.amin(1, keepdim=True)
    # Of equal scores the later token goes.
    at = held.place.masked_fill(held.score != low, -2).argmax(1, keepdim=True)
    out = held.place.gather(1, at)
    enters = (score > low) & (place < n)
    until.scatter_(1, torch.where(enters & (out >= 0), out, n), place)
    until.scatter_(1, torch.where(enters, place, n), n)
    held.place.scatter_(1, at, torch.where(enters, place, out))
    held.score.scatter_(1, at, torch.where(enters, score, low))
