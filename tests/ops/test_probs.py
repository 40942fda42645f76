"""Weights from the lse, and their sums, against the whole matrix."""

from __future__ import annotations

import pytest
import torch

from foveate.ops import (
    RelativeBias,
    apply_probs,
    attention,
    block_sums,
    causal,
    column_sums,
    diagonal_sums,
    probs,
    window,
)
from foveate.ops.errors import InputError

MASK = causal() & window(200, 0)


@pytest.fixture(params=[None, 3.0], ids=["plain", "softcap"])
def case(request):
    """q, k, v, lse, the whole weight matrix and the options of a call longer than one block."""
    q, k, v = (
        torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in ((4, 300), (2, 330), (2, 330))
    )
    scores = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) * 0.2
    if request.param:
        scores = request.param * torch.tanh(scores / request.param)
    i, j = torch.arange(300)[:, None] + 30, torch.arange(330)[None]
    hidden = (j > i) | (j < i - 200)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    options = {"scale": 0.2, "softcap": request.param}
    lse = attention(q, k, v, MASK, **options).lse
    return q, k, v, lse, weights, options


def test_rows(case):
    q, k, _, lse, weights, options = case
    rows = torch.tensor([299, 0, 17])
    torch.testing.assert_close(probs(q, k, lse, rows, MASK, **options), weights[:, :, rows])
    torch.testing.assert_close(probs(q, k, lse, mask=MASK, **options), weights)


def test_sums(case):
    q, k, _, lse, weights, options = case
    torch.testing.assert_close(column_sums(q, k, lse, MASK, **options), weights.sum(2))
    want = torch.stack([weights.diagonal(30 - t, 2, 3).sum(-1) for t in range(330)], -1)
    torch.testing.assert_close(diagonal_sums(q, k, lse, MASK, **options), want)
    cut = (
        torch.nn.functional.pad(weights, (0, 54, 0, 20)).unflatten(2, (5, 64)).unflatten(4, (6, 64))
    )
    got = block_sums(q, k, lse, 64, MASK, **options)
    torch.testing.assert_close(got, cut.sum((3, 5)))


def test_other_values(case):
    q, k, _, lse, weights, options = case
    values = torch.randn(2, 2, 330, 5, dtype=torch.float64)
    want = weights @ values.repeat_interleave(2, 1)
    torch.testing.assert_close(apply_probs(q, k, lse, values, MASK, **options), want)


def test_blind_rows_weigh_nothing_and_shapes_are_checked():
    q = torch.randn(1, 2, 4, 8)
    lse = torch.full((1, 2, 4), -torch.inf)
    assert not probs(q, q, lse).any()
    with pytest.raises(InputError, match=r"lse must be \(1, 2, 4\)"):
        probs(q, q, lse[:, :, :3])


def test_a_hidden_score_may_be_any_size_and_bias_counts():
    q = torch.randn(1, 2, 6, 8, requires_grad=True)
    k = torch.randn(1, 2, 6, 8)
    k[..., -1, :] *= 4000
    bias = torch.randn(2, 6, 6)
    lse = attention(q, k, k, causal(), bias=bias, backend="reference").lse
    weights = probs(q, k, lse, mask=causal(), bias=bias)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 6))
    (grad,) = torch.autograd.grad(weights[:, :, :5].square().sum(), q)
    assert torch.isfinite(grad).all()
    some = probs(q, k, lse, torch.tensor([4, 1]), causal(), bias=bias)
    torch.testing.assert_close(some, weights[:, :, [4, 1]])


@pytest.mark.parametrize("rows", [1, 6])
def test_a_relative_bias_counts(rows):
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 9, 8)
    bias = RelativeBias(torch.randn(1, 2, rows, 5), -4)
    lse = attention(q, k, k, causal(), bias=bias).lse
    weights = probs(q, k, lse, mask=causal(), bias=bias)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 6))
    some = probs(q, k, lse, torch.tensor([4, 1]), causal(), bias=bias)
    torch.testing.assert_close(some, weights[:, :, [4, 1]])
