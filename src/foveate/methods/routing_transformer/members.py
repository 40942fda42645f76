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

_BUDGET = 1 << 24  # comparisons that are held at once


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
    least = torch.finfo(scores.dtype).min
    ranks = torch.where(scores >= least, scores, least)
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

    A token enters if fewer than `count` of those before it score at least as much, and leaves when
    `count` others that beat it have come. Tokens are looked at in runs of doubling length, of which
    only those that may enter are compared: about w^2 log2(n / w) comparisons for each cluster
    unless scores rise all along.

    Args:
        scores: (..., n) fp32 or wider.
        count: w.
        real: as in `best`.
    """
    shape, n = scores.shape[:-1], scores.shape[-1]
    least = torch.finfo(scores.dtype).min
    ranks = torch.where(scores >= least, scores, least)
    if real is not None:
        ranks = ranks.masked_fill(~real, -torch.inf)
    ranks = ranks.reshape(-1, n)
    held = Held(
        torch.full((len(ranks), count), -1, device=scores.device),
        ranks.new_full((len(ranks), count), -torch.inf),
    )
    until = torch.zeros(ranks.shape, dtype=torch.int64, device=scores.device)
    start = 0
    while start < n:
        end = min(n, start + max(start, count))
        bar = held.score.amin(-1, keepdim=True)
        enters = ranks[:, start:end] > bar
        while end - start > count and int(enters.sum(-1).max()) > 4 * count:
            end = start + max(count, (end - start) // 2)
            enters = enters[:, : end - start]
        width = int(enters.sum(-1).max())
        if width:
            new = packed(enters, width)
            new = torch.where(new >= 0, new + start, -1)
            held = _run(held, new, ranks, until, count)
        start = end
    width = max(1, int((until > 0).sum(-1).max())) if until.numel() else 1
    place = packed(until > 0, width)
    stay = until.gather(-1, place.clamp_min(0)) if n else torch.zeros_like(place)
    return (
        Stay(place.view(*shape, width), stay.view(*shape, width)),
        Held(held.place.view(*shape, count), held.score.view(*shape, count)),
    )


def _run(held: Held, new: Tensor, ranks: Tensor, until: Tensor, count: int) -> Held:
    """Let `new` (R, E) come one after the other; writes `until` (R, n)."""
    step = max(1, _BUDGET // ((count + new.shape[1]) * new.shape[1]))
    parts = []
    for rows in torch.arange(len(new), device=new.device).split(step):
        one, ends = _compare(
            Held(held.place[rows], held.score[rows]), new[rows], ranks[rows], count
        )
        until[rows] = torch.where(ends > 0, ends, until[rows])
        parts.append(one)
    return Held(torch.cat([p.place for p in parts]), torch.cat([p.score for p in parts]))


def _compare(held: Held, new: Tensor, ranks: Tensor, count: int) -> tuple[Held, Tensor]:
    """Held after `new`, and where each token's stay ends as far as it is told here (R, n); else 0.

    Whoever beats j stays at least as long as j does, so that j leaves when the number of tokens
    that ever beat it, whether they are still there or not, reaches `count`.
    """
    n, width = ranks.shape[1], new.shape[1]
    score = ranks.gather(1, new.clamp_min(0)).masked_fill(new < 0, -torch.inf)
    places = torch.cat((held.place, new), 1)
    scores = torch.cat((held.score, score), 1)

    # How many of those held at first beat each token: of equal ones the earlier does.
    order = torch.sort(held.score, dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(count).to(order).expand_as(order)
    )
    rising = held.score.sort(1).values.contiguous()
    above = count - torch.searchsorted(rising, score.contiguous())
    first = torch.cat((rank, above), 1)

    # beats[r, j, e]: the e-th new token beats token j.
    beats = score[:, None, :] > scores[:, :, None]
    steps = torch.arange(width, device=new.device)
    before = steps[None, :] < steps[:, None]  # [j, e]: e came before j, and so wins a tie
    ties = before & (score[:, None, :] == score[:, :, None]) & (new >= 0)[:, None, :]
    beats[:, count:] |= ties
    so_far = beats.cumsum(2, dtype=torch.int32)
    own = torch.where(
        steps > 0,
        so_far[:, count:].gather(
            2, (steps - 1).clamp_min(0)[None, :, None].expand(len(new), -1, 1)
        )[..., 0],
        0,
    )
    enters = (first[:, count:] + own < count) & (new >= 0)
    member = torch.cat((held.place >= 0, enters), 1)
    gone = (so_far < (count - first)[..., None]).sum(2)  # the first new token with which it's out
    last = torch.nn.functional.pad(new, (0, 1), value=n)
    ends = last.gather(1, gone).masked_fill(~member, 0)
    until = torch.zeros_like(ranks, dtype=torch.int64)
    until.scatter_reduce_(1, places.clamp_min(0), ends, "amax")

    stays = packed(member & (gone == width), count)
    there = stays >= 0
    stays = stays.clamp_min(0)
    return Held(
        places.gather(1, stays).masked_fill(~there, -1),
        scores.gather(1, stays).masked_fill(~there, -torch.inf),
    ), until
