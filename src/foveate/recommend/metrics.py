"""Full-ranking metrics: every item that a user hasn't seen is ranked, none is sampled.

    recall@K = hits among the first K / positives
    ndcg@K   = sum over hits at rank j of 1 / log2(j + 1), over the same sum of an ideal ranking

The ideal ranking has all positives in front (`ideal="all"`). KGAT's published code has only those
there that were found among the first 100 (`ideal="retrieved"`), which gives higher figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foveate.ops.errors import InputError

RETRIEVED = 100


def ranking_figures(
    hits: Tensor, positives: Tensor, k: int, ideal: str = "all"
) -> dict[str, Tensor]:
    """Figures of each user.

    Args:
        hits: (B, M) bool, whether the item at each rank is a positive, best first; M >= k, and for
            "retrieved" as many as that counts.
        positives: (B,) int64, of each user, 1 or more.
        k: K.
        ideal: "all" or "retrieved".

    Returns:
        recall, ndcg and hit (whether there is any hit among the first K): (B,) float64 each.

    Raises:
        InputError: another `ideal`, or bad shapes.
    """
    if ideal not in ("all", "retrieved"):
        raise InputError(f"ranking_figures(ideal={ideal!r}): expected 'all' or 'retrieved'.")
    if hits.dim() != 2 or positives.shape != hits.shape[:1] or k < 1:
        raise InputError(
            f"ranking_figures: expected hits (B, M), positives (B,) and k of 1 or more, got "
            f"{tuple(hits.shape)}, {tuple(positives.shape)} and {k}."
        )
    gain = 1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64, device=hits.device))
    found = hits[:, :k].double()
    most = positives if ideal == "all" else hits[:, :RETRIEVED].sum(1)
    best = torch.cat((gain.new_zeros(1), gain.cumsum(0)))[most.clamp(max=k)]
    dcg = (found * gain[: found.shape[1]]).sum(1)
    return {
        "recall": found.sum(1) / positives,
        "ndcg": torch.where(best > 0, dcg / best.clamp(min=1e-300), 0.0),
        "hit": found.amax(1),
    }


@torch.no_grad()
def evaluate(
    score: Callable[[Tensor], Tensor],
    positives: Tensor,
    seen: Tensor,
    users: int,
    items: int,
    ks: Sequence[int] = (20,),
    ideal: str = "all",
    chunk: int = 1 << 22,
) -> dict[str, float]:
    """Means over the users that have a positive.

    Args:
        score: users (B,) -> (B, I).
        positives: (n, 2) of (user, item) to be found.
        seen: (m, 2) that aren't ranked; none of `positives` may be among them.
        users: U.
        items: I.
        ks: each K.
        ideal: as in `ranking_figures`.
        chunk: scores held at a time, which bounds the memory.

    Returns:
        "recall@20", "ndcg@20", "hit@20" ... and "users", how many were judged.

    Raises:
        InputError: nobody has a positive.
    """
    mine, theirs = _Rows(positives, users), _Rows(seen, users)
    judged = mine.count.nonzero().flatten()
    if not len(judged):
        raise InputError("evaluate: no user has an item to be found; give a test part.")
    sums = dict.fromkeys((f"{name}@{k}" for k in ks for name in ("recall", "ndcg", "hit")), 0.0)
    most = min(items, max(RETRIEVED, *ks))
    for some in judged.split(max(1, chunk // items)):
        scores = score(some).float().clone()
        row, item = theirs.of(some)
        scores[row.to(scores.device), item.to(scores.device)] = -torch.inf
        best = scores.topk(most).indices.cpu()
        relevant = torch.zeros(len(some), items, dtype=torch.bool)
        relevant[mine.of(some)] = True
        hits = relevant.gather(1, best)
        for k in ks:
            for name, value in ranking_figures(hits, mine.count[some], k, ideal).items():
                sums[f"{name}@{k}"] += float(value.sum())
    return {name: value / len(judged) for name, value in sums.items()} | {
        "users": float(len(judged))
    }


class _Rows:
    """Pairs (n, 2) by user."""

    def __init__(self, pairs: Tensor, users: int) -> None:
        self.item = pairs[torch.argsort(pairs[:, 0], stable=True), 1]
        self.count = pairs[:, 0].bincount(minlength=users)
        self.first = self.count.cumsum(0) - self.count

    def of(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """(row in `users`, item) of all their pairs."""
        count = self.count[users]
        row = torch.repeat_interleave(torch.arange(len(users)), count)
        offset = self.first[users] - (count.cumsum(0) - count)
        return row, self.item[torch.repeat_interleave(offset, count) + torch.arange(len(row))]


def leave_one_out(scores: Tensor, target: Tensor, seen: Tensor) -> Tensor:
    """The rank, from 0, of each row's target among all items not seen; ties go to lower numbers.

    Args:
        scores: (B, I).
        target: (B,) int64.
        seen: (B, I) bool; a target counts even where it was seen.
    """
    own = scores.gather(1, target[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    better = (scores > own) | ((scores == own) & before)
    return (better & ~seen).sum(1)


def rank_figures(rank: Tensor, ks: Sequence[int] = (5, 10, 20)) -> dict[str, float]:
    """HR@K and NDCG@K = ln 2 / ln(rank + 2), means over ranks from 0 (n,)."""
    gain = 1 / torch.log2(rank.double() + 2)
    found: dict[str, float] = {}
    for k in ks:
        inside = rank < k
        found[f"hr@{k}"] = float(inside.double().mean())
        found[f"ndcg@{k}"] = float((gain * inside).mean())
    return found
