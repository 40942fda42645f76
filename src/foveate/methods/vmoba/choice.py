"""Which (block, query) pairs are kept: the k best, or the best until their scores add up to tau.

Scores g (H, S, C) of one sequence, own (S,) the block of each query. A pool is what competes:

    "query"        the blocks of one query in one head
    "query-heads"  the blocks of one query in all heads
    "head"         all pairs of a head (global; the method)
    "block"        the queries of one block in one head

threshold: with n = (g - min) / (max - min) in the pool and its sum T, own pairs are kept and count,
rem = max(0, tau - sum_own n / (T + 1e-6)); of the others the shortest run in falling order whose
sum / T reaches rem, and one at least. In the paper's own form own pairs are like others.
topk: k pairs for each query that competes, own pairs among them.

Source: Wu et al. 2025, arXiv 2506.23858, section 3.3; KwaiVGI/VMoBA. All in fp32 or wider, ties to
the lower index.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveate.parts.selection import topk_mask

Scope = Literal["query", "query-heads", "head", "block"]
SCOPES: tuple[Scope, ...] = ("query", "query-heads", "head", "block")
_BINS = 4096
_SORTED = 8192


def choose_pairs(
    g: Tensor,
    own: Tensor,
    scope: Scope,
    *,
    tau: float | None = None,
    topk: int | None = None,
    keep_own: bool = True,
) -> Tensor:
    """The pairs that are kept: bool (H, S, C).

    Args:
        g: (H, S, C) scores.
        own: (S,) int64 block of each query.
        scope: what competes.
        tau: threshold; or
        topk: blocks for each query, own ones counted.
        keep_own: keep own pairs whatever they score.
    """
    heads, queries, count = g.shape
    if not g.numel():
        return torch.zeros_like(g, dtype=torch.bool)
    mine = torch.zeros(queries, count, dtype=torch.bool, device=g.device)
    mine = mine.scatter_(1, own[:, None], True) & keep_own
    pools, special = _pooled(g, scope), _pooled(mine.expand_as(g), scope)
    if topk is None:
        assert tau is not None
        kept = _reach(pools, special, tau)
    else:
        number = {
            "query": topk,
            "query-heads": topk * heads,
            "head": topk * queries,
            "block": max(1, round(topk * queries / count)),
        }[scope]
        # Own pairs come first; where there are more of them than places all are kept.
        kept = topk_mask(pools.masked_fill(special, torch.inf), number) | special
    return _unpooled(kept, scope, g.shape)


def _pooled(x: Tensor, scope: Scope) -> Tensor:
    """(H, S, C) with what competes along the last axis."""
    if scope == "query":
        return x
    if scope == "query-heads":
        return x.transpose(0, 1).flatten(1)
    return x.flatten(1) if scope == "head" else x.mT


def _unpooled(x: Tensor, scope: Scope, shape: torch.Size) -> Tensor:
    if scope == "query-heads":
        return x.unflatten(1, (shape[0], shape[2])).transpose(0, 1)
    return x.view(shape) if scope in ("query", "head") else x.mT


def _reach(g: Tensor, own: Tensor, tau: float) -> Tensor:
    """The threshold's choice in each pool: bool, as g (..., n)."""
    low, high = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
    span = high - low
    n = ((g - low) / torch.where(span <= 1e-6, torch.ones_like(span), span)).double()
    total = n.sum(-1, keepdim=True)
    mass = torch.where(own, n, 0.0).sum(-1, keepdim=True)
    rest = torch.where(own, 0.0, n).sum(-1, keepdim=True)
    # No further than all others reach; what scores 0 adds nothing and stays out.
    target = ((tau - mass / (total + 1e-6)).clamp_min(0) * total).minimum(rest)
    picked = _by_sort if g.shape[-1] <= _SORTED else _by_bins
    return own | picked(n, own, target)


def _by_sort(n: Tensor, own: Tensor, target: Tensor) -> Tensor:
    """Others in falling order until their sum reaches the target; one at least."""
    ranked = n.masked_fill(own, -1.0)
    values, order = ranked.sort(dim=-1, descending=True, stable=True)
    values = values.clamp_min(0)
    before = values.cumsum(-1) - values
    kept = (before < target) & (values > 0)
    kept[..., 0] = True
    return torch.zeros_like(own).scatter_(-1, order, kept) & ~own


def _by_bins(n: Tensor, own: Tensor, target: Tensor) -> Tensor:
    """The same, in time linear in n: only the bin that crosses the target is sorted."""
    bins = (n * _BINS).long().clamp_max_(_BINS - 1)
    weight = torch.where(own, 0.0, n)
    sums = n.new_zeros(*n.shape[:-1], _BINS).scatter_add_(-1, bins, weight)
    reached = sums.flip(-1).cumsum(-1).flip(-1)  # of a bin and all above it
    crosses = (reached >= target).sum(-1, keepdim=True) - 1  # the highest that reaches it
    crosses = crosses.clamp_min(0)
    kept = (bins > crosses) & ~own
    above = (reached - sums).gather(-1, crosses)
    inside = (bins == crosses) & ~own
    flat_kept, flat_in = kept.view(-1, n.shape[-1]), inside.view(-1, n.shape[-1])
    for row, (values, some) in enumerate(zip(n.view(-1, n.shape[-1]), flat_in)):
        at = some.nonzero()[:, 0]
        ranked, order = values[at].sort(descending=True, stable=True)
        before = above.view(-1)[row] + ranked.cumsum(0) - ranked
        flat_kept[row, at[order[(before < target.view(-1)[row]) & (ranked > 0)]]] = True
    best = n.masked_fill(own, -1.0).argmax(-1, keepdim=True)
    return kept.scatter(-1, best, True) & ~own
