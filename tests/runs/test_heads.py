"""Figures of heads and hidden states: the spec attention-sink's metrics, by whole matrices."""

from __future__ import annotations

import math

import pytest
import torch

from foveate import Context, causal, padding, window
from foveate.ops.errors import InputError
from foveate.runs.activations import activations, quantised_error
from foveate.runs.heads import (
    Wanted,
    density,
    effective_rank,
    head_figures,
    similarity,
    sink_rate,
    uniform_importance,
)


def qkv(q_len=150, kv_len=150, batch=2, dtype=torch.float64):
    shapes = (batch, 4, q_len, 16), (batch, 2, kv_len, 16), (batch, 2, kv_len, 24)
    return tuple(2 * torch.randn(s, dtype=dtype) for s in shapes)


def whole(q, k, mask, scale=0.25):
    """A (B, Hq, Lq, Lkv), and who sees whom."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    table = mask.dense(q.shape[2], k.shape[2]).expand(*q.shape[:3], -1)
    s = (q @ k.mT * scale).masked_fill(~table, -torch.inf)
    return s.softmax(-1).nan_to_num(0.0), table


def test_oracle_4_importance_of_one_key_and_of_uniform_attention():
    q, v = torch.ones(1, 1, 64, 8).double(), torch.randn(1, 1, 64, 8).double()
    k = torch.zeros(1, 1, 64, 8).double()
    uniform = head_figures(q, k, v, Context(mask=causal())).importance[0, 0]
    assert float(uniform[0]) == pytest.approx(0.07412, abs=5e-6)
    assert float(uniform[1]) == pytest.approx(0.05943, abs=5e-6)
    assert float(uniform[0]) == pytest.approx(math.fsum(1 / i for i in range(1, 65)) / 64, rel=1e-6)
    for key in (0, 1, 40, 63):
        assert uniform_importance(64, key) == pytest.approx(float(uniform[key]), rel=1e-5)
    k[:, :, 0] = 100.0
    first = head_figures(q, k, v, Context(mask=causal()))
    assert float(first.importance[0, 0, 0]) == pytest.approx(1.0, abs=1e-12)
    assert sink_rate(first.importance) == 1.0
    assert sink_rate(first.importance, key=1) == 0.0
    assert float(first.no_op) < 1e-6  # all that a head gives is the sink's
    one_of_each = math.fsum(1 / i for i in range(1, 65)) / 64
    assert float(first.density[0.99]) == pytest.approx(one_of_each)


@pytest.mark.parametrize("mask", [causal(), causal() & window(40, 0), window(-1, -1)], ids=repr)
def test_figures_are_those_of_the_whole_matrix(mask):
    q, k, v = qkv()
    wanted = Wanted(sinks=2, near=9, rows=150, cells=10)
    got = head_figures(q, k, v, Context(mask=mask, scale=0.25), wanted)
    a, table = whole(q, k, mask)
    rows = table.any(-1)
    count = rows.sum(-1)

    def mean(x):
        return (x * rows).sum(-1) / count

    wide = v.repeat_interleave(2, 1)
    far = (torch.arange(150)[:, None] - torch.arange(150)).abs()
    entropy = -torch.where(a > 0, a * a.clamp_min(1e-300).log(), 0.0).sum(-1)
    norm = (a @ wide).norm(dim=-1)
    rest = (a[..., 2:] @ wide[:, :, 2:]).norm(dim=-1)
    for name, expected in {
        "importance": a.sum(2) / table.sum(2).clamp_min(1),
        "sink_share": mean(a[..., :2].sum(-1)),
        "entropy": mean(entropy),
        "spread": mean(entropy / table.sum(-1).clamp_min(2).log()),
        "distance": mean((a * far).sum(-1)),
        "near": mean((a * (far <= 9)).sum(-1)),
        "no_op": mean(torch.where(norm > 0, rest / norm.clamp_min(1e-30), 0.0)),
        "sampled": a.mean(1),
        "maps": a.unflatten(2, (10, 15)).unflatten(4, (10, 15)).mean((3, 5)),
    }.items():
        torch.testing.assert_close(getattr(got, name), expected, atol=1e-10, rtol=1e-9, msg=name)
    norms = v.norm(dim=-1)
    drain = norms[..., :2].mean(-1) / norms.sort(-1).values[..., 74]  # the lower median, as torch's
    torch.testing.assert_close(got.drain, drain)
    cos = torch.nn.functional.cosine_similarity(
        q[:, :, :, None], k.repeat_interleave(2, 1)[:, :, None], dim=-1
    )
    torch.testing.assert_close(got.sink_cosine, cos[..., :2].mean((2, 3)))
    torch.testing.assert_close(got.other_cosine, cos[..., 2:].mean((2, 3)))


def test_more_keys_than_queries_and_sink_logits():
    q, k, v = qkv(31, 90)
    b = torch.randn(4, dtype=q.dtype)
    got = head_figures(q, k, v, Context(mask=causal(), scale=0.25, sink_logits=b), Wanted(cells=0))
    a, table = whole(q, k, causal())
    wide = k.repeat_interleave(2, 1)
    s = (q @ wide.mT * 0.25).masked_fill(~table, -torch.inf)
    a = torch.cat((s, b[None, :, None, None].expand(2, 4, 31, 1)), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(got.importance, a.sum(2) / table.sum(2))
    assert got.maps is None


def test_effective_rank_and_density():
    assert float(effective_rank(torch.eye(7))) == pytest.approx(7.0, rel=1e-5)
    one = torch.randn(9, 1) @ torch.randn(1, 30)
    assert float(effective_rank(one)) == pytest.approx(1.0, abs=1e-3)
    sigma = torch.tensor([3.0, 1.0])
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert float(effective_rank(torch.diag(sigma))) == pytest.approx(expected, rel=1e-5)
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert float(density(p, 0.75)) == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert float(density(p, 0.45)) == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_layers_that_share_a_sink_look_alike_until_it_is_left_out():
    first, other = torch.zeros(5, 40), torch.zeros(5, 40)
    first[:, 0] = other[:, 0] = 0.9
    first[:, 7] = other[:, 20] = 0.1
    same = similarity([first, other])
    apart = similarity([first, other], skip=1)
    torch.testing.assert_close(same.diagonal(), torch.ones(2))
    assert float(same[0, 1]) > 0.98
    assert float(apart[0, 1]) == 0.0


def test_padding_is_refused():
    q, k, v = qkv(20, 20)
    with pytest.raises(InputError, match="no padding"):
        head_figures(q, k, v, Context(mask=causal() & padding(torch.tensor([20, 13]))))
    whole_rows = Context(mask=causal() & padding(torch.tensor([20, 20])))
    assert head_figures(q, k, v, whole_rows).importance.isfinite().all()
    at = torch.arange(20)[None] - torch.tensor([[0], [3]])
    with pytest.raises(InputError, match="first key"):
        head_figures(q, k, v, Context(mask=causal(), q_positions=at, kv_positions=at))


# -- hidden states -------------------------------------------------------------------------------
def test_massive_activations_by_both_tests():
    x = torch.randn(2, 30, 16)
    x[1, 0, 3] = 5000.0
    x[0, 9, 5] = 300.0  # large, but not 1000 times the median
    found = activations(x)
    assert (found.massive, found.tokens, found.channels) == (1, (0,), (3,))
    assert (found.largest, found.elsewhere) == (5000.0, 300.0)
    assert found.median == pytest.approx(float(x.abs().flatten().median()))
    norms = x.norm(dim=-1)
    assert found.peak == pytest.approx(float((norms[:, 0] / norms.mean(1)).mean()), rel=1e-5)
    small = activations(x / 100)  # 50 at most: the absolute test fails
    assert small.massive == 0
    real = torch.ones(2, 30, dtype=torch.bool)
    real[1, 0] = False
    assert activations(x, real).massive == 0


def test_outliers_cost_bits():
    x = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    top = float(x.abs().max())
    step = top / 127
    by_hand = [(round(float(v) / step) * step - float(v)) ** 2 for v in x.flatten()]
    expected = math.sqrt(sum(by_hand) / len(by_hand)) / float(x.square().mean().sqrt())
    assert quantised_error(x, 8) == pytest.approx(expected, rel=1e-4)
    loud = x.clone()
    loud[0, 0] = 1000.0
    # one entry takes all steps: nothing is left for the others
    quiet = (loud / (1000 / 127)).round() * (1000 / 127) - loud
    assert quiet[0, 1:].abs().mean() > 30 * quantised_error(x, 8)
    assert quantised_error(x, 4) > 10 * quantised_error(x, 8)
    gauss = activations(x[None])
    assert gauss.kurtosis == pytest.approx(3.0, abs=0.15)
    assert activations(loud[None]).kurtosis > 1000
