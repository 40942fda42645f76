"""How well texts are found: nDCG and recall, from scores of all passages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.ops.errors import InputError

Gains = Sequence[dict[int, float]]


def ndcg(ranking: Sequence[int], gains: dict[int, float], at: int = 10) -> float:
    """Discounted gain of the first `at`, as a share of the best one: sum g / log2(1 + rank)."""
    found = math.fsum(gains.get(p, 0.0) / math.log2(r + 2) for r, p in enumerate(ranking[:at]))
    best = sorted(gains.values(), reverse=True)[:at]
    return found / math.fsum(gain / math.log2(r + 2) for r, gain in enumerate(best))


def recall(ranking: Sequence[int], gains: dict[int, float], at: int = 100) -> float:
    """Share of the passages with a gain that are among the first `at`."""
    return len(set(ranking[:at]) & gains.keys()) / len(gains)


def judge(scores: Tensor, gains: Gains, *, first: int = 10, among: int = 100) -> dict[str, float]:
    """Means over questions.

    Args:
        scores: (questions, passages); -inf was not retrieved.
        gains: for each question the gain of each passage that has one; at least one.
        first: of nDCG.
        among: of recall.

    Returns:
        `nDCG@10` and `recall@100`, or with the numbers that were given.

    Raises:
        InputError: the numbers of questions differ, or one has no passage.
    """
    if len(scores) != len(gains) or not len(gains) or not all(gains):
        raise InputError(
            f"judge: {len(scores)} rows of scores, {len(gains)} questions with gains; expected as "
            "many, 1 or more, each with a passage to find."
        )
    most = min(scores.shape[1], max(first, among))
    top = scores.topk(most, dim=1)
    rankings = [
        [p for p, s in zip(row, values) if s > -math.inf]
        for row, values in zip(top.indices.tolist(), top.values.tolist())
    ]
    return {
        f"nDCG@{first}": _mean([ndcg(r, g, first) for r, g in zip(rankings, gains)]),
        f"recall@{among}": _mean([recall(r, g, among) for r, g in zip(rankings, gains)]),
    }


def refined(first: Tensor, full: Tensor, candidates: int) -> Tensor:
    """Scores of the candidates that one score retrieves and another ranks; others are -inf.

    Args:
        first: (questions, passages), retrieves.
        full: likewise, ranks.
        candidates: how many are ranked.
    """
    at = first.topk(min(candidates, first.shape[1]), dim=1).indices
    out = torch.full_like(full, -math.inf)
    return out.scatter(1, at, full.gather(1, at))


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
