"""Top-k and threshold selection: exact, under a mask, ties to the lower index."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.ops.errors import InputError
from foveate.parts.selection import threshold_mask, topk_mask

NUMBERS = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0, math.inf, math.nan])
ROWS = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(NUMBERS, min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.integers(0, n + 2),
    )
)


def by_sorting(scores, allowed, k):
    def rank(i):
        score = -math.inf if math.isnan(scores[i]) else scores[i]
        return (-score, i)

    best = sorted((i for i in range(len(scores)) if allowed[i]), key=rank)[:k]
    return [i in best for i in range(len(scores))]


@given(ROWS)
def test_topk_is_the_sorted_head(row):
    scores, allowed, k = row
    # -inf and NaN both count as lowest, so that order among them is the index's.
    scores = [-math.inf if math.isnan(s) else s for s in scores]
    chosen = topk_mask(torch.tensor([row[0]]), k, torch.tensor([allowed]))
    assert chosen.tolist() == [by_sorting(scores, allowed, k)]


@given(ROWS, st.sampled_from([-1.0, 0.0, 0.25, 2.0]))
def test_threshold_keeps_all_above_and_never_too_few(row, threshold):
    scores, allowed, least = row
    chosen = threshold_mask(torch.tensor([scores]), threshold, torch.tensor([allowed]), least)[0]
    above = [a and s >= threshold for s, a in zip(scores, allowed)]
    floor = by_sorting(scores, allowed, least)
    assert chosen.tolist() == [x or y for x, y in zip(above, floor)]


def test_low_precision_scores_are_compared_as_they_are():
    scores = torch.tensor([[1.0, 1.0078125, 1.0]], dtype=torch.bfloat16)
    assert topk_mask(scores, 1).tolist() == [[False, True, False]]
    assert topk_mask(torch.ones(2, 3, 5), 2).tolist() == [[[True] * 2 + [False] * 3] * 3] * 2


def test_negative_k_is_refused():
    with pytest.raises(InputError, match="k=-1"):
        topk_mask(torch.zeros(3), -1)
