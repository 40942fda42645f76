"""Full-ranking metrics against hand values and brute force."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.ops.errors import InputError
from foveate.recommend.metrics import evaluate, leave_one_out, rank_figures, ranking_figures


def test_oracle_7_recall_and_ndcg_by_hand():
    hits, positives = torch.tensor([[True, False, True]]), torch.tensor([3])
    found = ranking_figures(hits, positives, 3)
    assert float(found["recall"]) == pytest.approx(2 / 3)
    assert float(found["ndcg"]) == pytest.approx(1.5 / (1 + 1 / math.log2(3) + 0.5))
    assert round(float(found["ndcg"]), 4) == 0.7039
    # The reference's ideal has the two retrieved hits only: 1 + 1 / log2(3).
    other = ranking_figures(hits, positives, 3, ideal="retrieved")
    assert float(other["ndcg"]) == pytest.approx(1.5 / (1 + 1 / math.log2(3)))
    assert float(other["recall"]) == float(found["recall"])
    late = torch.zeros(1, 120, dtype=torch.bool)
    late[0, [1, 50, 110]] = True  # the ideal knows of ranks up to 100
    found = ranking_figures(late, torch.tensor([3]), 20, ideal="retrieved")
    assert float(found["ndcg"]) == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    none = ranking_figures(torch.zeros(1, 5, dtype=torch.bool), torch.tensor([2]), 5, "retrieved")
    assert float(none["ndcg"]) == float(none["hit"]) == 0
    with pytest.raises(InputError, match="'all' or 'retrieved'"):
        ranking_figures(hits, positives, 3, ideal="best")


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_evaluate_is_what_a_loop_finds(chunk):
    users, items, k = 9, 30, 4
    scores = torch.randn(users, items)
    drawn = torch.rand(users, items)
    seen, positives = (drawn < 0.3).nonzero(), ((drawn > 0.8) & (torch.arange(9) != 5)[:, None])
    found = evaluate(lambda u: scores[u], positives.nonzero(), seen, users, items, (k,),
                     chunk=chunk)  # fmt: skip
    held = set(map(tuple, seen.tolist()))
    recalls, ndcgs = [], []
    for u in range(users):
        wanted = set(positives[u].nonzero().flatten().tolist())
        if not wanted:
            continue
        ranked = sorted(
            (i for i in range(items) if (u, i) not in held), key=lambda i: -scores[u, i]
        )
        hits = [i in wanted for i in ranked[:k]]
        recalls.append(sum(hits) / len(wanted))
        dcg = sum(h / math.log2(j + 2) for j, h in enumerate(hits))
        ndcgs.append(dcg / sum(1 / math.log2(j + 2) for j in range(min(k, len(wanted)))))
    assert found["users"] == len(recalls) < users
    assert found[f"recall@{k}"] == pytest.approx(sum(recalls) / len(recalls))
    assert found[f"ndcg@{k}"] == pytest.approx(sum(ndcgs) / len(ndcgs))
    with pytest.raises(InputError, match="no user has an item"):
        evaluate(lambda u: scores[u], seen[:0], seen, users, items)


def test_leave_one_out_ranks_and_figures():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9], [1.0, 1.0, 1.0, 1.0]])
    seen = torch.tensor([[False, False, False, True], [True, False, False, False]])
    rank = leave_one_out(scores, torch.tensor([2, 3]), seen)
    assert rank.tolist() == [1, 2]
    found = rank_figures(torch.tensor([0, 1, 7, 30]), (5, 10))
    assert found["hr@5"] == 0.5
    assert found["hr@10"] == 0.75
    ln = math.log
    assert found["ndcg@5"] == pytest.approx((1 + ln(2) / ln(3)) / 4)
    assert found["ndcg@10"] == pytest.approx((1 + ln(2) / ln(3) + ln(2) / ln(9)) / 4)
