"""Which keys a query keeps: the w of the largest importance among those that it may see.

    S_t = the w largest c[t, .],   c[t, j] = delta_j if j <= t and j is no padding, else -inf

Importance doesn't depend on the query, so the w-th largest of what came so far only rises: a key
that was dropped never returns (S_{t+1} less t + 1 is a part of S_t), and key j is kept by the
queries j ... end_j - 1. All keep sets together are one number for each key, found here in runs of
keys without an L x L matrix. Equal importance: the later key wins, so that a layer whose keys are
all alike is a sliding window.
"""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 64


def ends(importance: Tensor, window: int, start: int = 0) -> Tensor:
    """The first query that no longer keeps each key: (B, G, L) int64.

    Key j is kept by the queries t with j <= t < ends_j; ends_j <= max(j, start) if by none of
    them, and L if by all to the end.

    Args:
        importance: (B, G, L); -inf is padding, which is never kept.
        window: w, keys to keep.
        start: the first query that counts; those before may be told anything.
    """
    batches, groups, length = importance.shape
    device = importance.device
    # Ranks in place of importance: distinct integers, the later of equal keys higher.
    order = importance.flatten(0, 1).argsort(dim=-1, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(length, device=device).expand_as(order))
    ranks = ranks.masked_fill(importance.flatten(0, 1) == -torch.inf, -1)
    spare = length  # a place for what belongs to no key
    end = ranks.new_full((len(ranks), length + 1), length)
    begin = min(max(window, start), length)
    kept, place = ranks[:, :begin].topk(min(window, begin), 1, sorted=False)
    if begin > window:  # what didn't come through to the first query that counts
        end[:, :begin] = 0
        end.scatter_(1, place, length)
    for at in range(begin, length, RUN):
        kept = _run(ranks, order, kept, end, at, min(at + RUN, length), spare)
    found = end[:, :length].masked_fill(ranks < 0, 0)
    return found.view(batches, groups, length)


def _run(
    ranks: Tensor, order: Tensor, kept: Tensor, end: Tensor, at: int, stop: int, spare: int
) -> Tensor:
    """Let keys at ... stop - 1 come; notes who is dropped when, and returns what is then kept.

    kept: (N, w) ranks, -1 for a place that is still free. Each key that comes drops the least of
    w + 1, so only the lowest of those kept, as many as keys come, can be dropped in this run.
    """
    new = ranks[:, at:stop]
    steps = stop - at
    low, where = kept.topk(min(steps, kept.shape[1]), 1, largest=False)
    pool = torch.cat((low, new), 1)
    # x is dropped as soon as as many that beat it are there as there are places.
    beats = (new[:, None, :] > pool[..., None]).cumsum(2)
    older = torch.searchsorted(low.contiguous(), pool, right=True)
    need = older  # places, less the low ones that beat x
    dropped = (beats < need[..., None]).sum(2)
    own = torch.arange(steps, device=ranks.device)
    dropped[:, low.shape[1] :] = dropped[:, low.shape[1] :].maximum(own)
    keys = order.gather(1, pool.clamp_min(0)).masked_fill(pool < 0, spare)
    value = torch.where(dropped < steps, dropped + at, end.shape[1] - 1)
    end.scatter_(1, keys, value)
    best = pool.topk(low.shape[1], 1, sorted=False).values
    return kept.scatter(1, where, best)


def smoothed(end: Tensor, size: int, first: Tensor) -> tuple[Tensor, Tensor]:
    """Block smoothing: a block counts whole iff strictly more than half of it is kept.

    A query's own block is cut at the query, as the reference cuts the last block of a sequence, so
    that decoding equals the forward; before its end a block may come and go, after it only goes.

    Args:
        end: (B, G, L) of `ends`, for all queries.
        size: keys of a block.
        first: (B, G) index of the first real key, from which blocks count.

    Returns:
        (B, G, L) int64: key j of a finished block is seen by the queries behind the block and
        before this; and (B, G, L) bool: whether query t sees its own block as far as itself.
    """
    batches, groups, length = end.shape
    index = torch.arange(length, device=end.device)
    place = (index - first[..., None]).clamp_min(0)  # (B, G, L)
    blocks = -(-length // size)
    slots = first[..., None] + torch.arange(blocks * size, device=end.device)
    inside = slots < length
    slots = slots.clamp_max(length - 1)
    ends_of = end.gather(2, slots).masked_fill(~inside, 0).view(batches, groups, blocks, size)
    # Kept by more than half: the (size // 2 + 1)-th longest life isn't over.
    until = ends_of.sort(-1, descending=True).values[..., size // 2]
    # Within the block: how many of its first s keys query s - 1 keeps.
    queries = slots.view(batches, groups, blocks, size)
    alive = ends_of[..., None, :] > queries[..., :, None]
    alive = alive & torch.ones(size, size, dtype=torch.bool, device=end.device).tril()
    own = alive.sum(-1) * 2 > torch.arange(1, size + 1, device=end.device)
    return until.gather(2, place // size), own.flatten(2).gather(2, place)
