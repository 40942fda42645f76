"""Span-search: each query scores about t^p anchors with its routing query and takes the best k.

    sigma_m = Q1_t . K_{a_m}        (no scale; fp32)

The anchors a_m move with the query. For one m they stand at one distance from all queries, so that
its scores are products of Q1 and of K moved by that distance, read as they lie; where queries are
few, as in decoding, their anchors are gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GATHERED = 8  # queries; from more on keys are moved instead
_NUMBERS = 1 << 18  # that are multiplied in one go


@torch.no_grad()
def best_anchors(
    query: Tensor, key: Tensor, distances: tuple[int, ...], first: Tensor, count: int
) -> Tensor:
    """The keys of the best anchors: (B, Hq, Lq, count) int64, best first; -1 where there are fewer.

    Args:
        query: (B, Hq, Lq, D), routing queries; the last stands at the last key.
        key: (B, G, Lkv, D).
        distances: of the anchors from their query, rising.
        first: (B,) index of each sequence's first real key; no anchor lies before it.
        count: k.

    Of equal scores the nearer anchor is taken.
    """
    batch, heads, q_len, _ = query.shape
    shift = key.shape[2] - q_len
    behind = torch.tensor(distances, dtype=torch.int64, device=query.device)
    found = []
    rows = q_len
    if q_len > _GATHERED:
        rows = max(1, _NUMBERS // max(1, batch * heads * query.shape[3]))
    for start in range(0, q_len, rows):
        stop = min(start + rows, q_len)
        at = torch.arange(start + shift, stop + shift, device=query.device)
        possible = int(torch.searchsorted(behind, int(at[-1]), right=True))
        if not possible:
            found.append(at.new_full((batch, heads, len(at), count), -1))
            continue
        anchors = at - behind[:possible, None]  # (M, n)
        part = query[:, :, start:stop]
        if q_len <= _GATHERED:
            scores = _by_gathering(part, key, anchors)
        else:
            scores = _by_moving(part, key, distances[:possible], start + shift)
        scores.masked_fill_((anchors < first[:, None, None])[:, None], -torch.inf)
        best = _best(scores, count)
        picked = anchors.expand(batch, heads, -1, -1).gather(2, best.clamp_min(0))
        found.append(picked.masked_fill(best < 0, -1).transpose(2, 3))
    return torch.cat(found, 2)


def _best(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of scores (B, Hq, M, n), which are used up: (B, Hq, count, n) indices.

    Best first; -1 where too few are finite. Of equal ones the first is taken, as torch.max says.
    """
    found = []
    for _ in range(count):
        top, at = scores.max(2, keepdim=True)
        found.append(at.masked_fill(top == -torch.inf, -1))
        scores.scatter_(2, at, -torch.inf)
    return torch.cat(found, 2)


def _by_gathering(query: Tensor, key: Tensor, anchors: Tensor) -> Tensor:
    """Scores (B, Hq, M, n) of keys that are put side by side for each query."""
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = key.shape[1]
    picked = key[:, :, anchors.mT.clamp_min(0)].to(wide)  # (B, G, n, M, D)
    shared = query.to(wide).unflatten(1, (groups, -1)).transpose(2, 3)  # (B, G, n, R, D)
    return (shared @ picked.mT).permute(0, 1, 3, 4, 2).flatten(1, 2)


def _by_moving(query: Tensor, key: Tensor, distances: tuple[int, ...], at: int) -> Tensor:
    """Scores (B, Hq, M, n) of queries at keys at, at + 1, ..., one distance after the other."""
    wide = torch.promote_types(query.dtype, torch.float32)
    n = query.shape[2]
    shared = query.to(wide).unflatten(1, (key.shape[1], -1))  # (B, G, R, n, D)
    low = max(0, at - distances[-1])
    near = key[:, :, None, low : at + n]  # widened as it is multiplied, not once a call
    scores = shared.new_zeros(*shared.shape[:3], len(distances), n)
    for m, distance in enumerate(distances):
        skip = max(0, distance - at)  # queries that have no such anchor
        moved = near[:, :, :, at + skip - distance - low : at + n - distance - low]
        scores[:, :, :, m, skip:] = (shared[..., skip:, :] * moved).sum(-1)
    return scores.flatten(1, 2)
