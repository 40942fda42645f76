"""Sums of the last rows' attention against the whole matrix, formed and added up in loops."""

from __future__ import annotations

import pytest
import torch

from foveate.ops import blocks, causal, documents, padding, window
from foveate.parts import Context
from foveate.parts import estimate as module
from foveate.parts.estimate import last_row_sums
from foveate.parts.tokens import tokens_of


def by_loops(q, k, allowed, rows, scale=None, softcap=None, bias=None):
    """c_j and o_t of one sequence; q (Hq, Lq, D), k (Hkv, Lkv, D), allowed (Lq, Lkv)."""
    heads, q_len, dim = q.shape
    kv_len = k.shape[1]
    vertical, slash = torch.zeros(2, heads, kv_len, dtype=torch.float64)
    for h in range(heads):
        scores = q[h].double() @ k[h * len(k) // heads].double().T
        scores = scores * (dim**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[h]
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
        for i in rows:
            for j in range(kv_len):
                vertical[h, j] += weights[i, j]
                distance = i + kv_len - q_len - j
                if distance >= 0:
                    slash[h, distance] += weights[i, j]
    return vertical, slash


def sums(q, k, ctx, last):
    return last_row_sums(q, k, ctx, tokens_of(q, k, ctx), last)


def qk(batch=1, heads=4, kv_heads=2, q_len=40, kv_len=40, dtype=torch.float64):
    q = torch.randn(batch, heads, q_len, 8, dtype=dtype)
    return q, torch.randn(batch, kv_heads, kv_len, 8, dtype=dtype)


@pytest.mark.parametrize("budget", [1 << 21, 200], ids=["at once", "row by row"])
def test_oracle_mminference_3_slash_sums_by_brute_force(monkeypatch, budget):
    monkeypatch.setattr(module, "_BUDGET", budget)
    q, k = qk()
    ours = sums(q, k, Context(mask=causal()), 8)
    allowed = causal().dense(40, 40)[0, 0]
    vertical, slash = by_loops(q[0], k[0], allowed, range(32, 40))
    torch.testing.assert_close(ours.slash[0], slash, atol=1e-15, rtol=1e-15)
    torch.testing.assert_close(ours.vertical[0], vertical, atol=1e-15, rtol=1e-15)


def test_what_the_model_asks_for_counts():
    q, k = qk(heads=3, kv_heads=1)
    bias = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    ctx = Context(mask=causal() & window(9, 0), scale=0.7, softcap=1.5, bias=bias)
    ours = sums(q, k, ctx, 8)
    allowed = (causal() & window(9, 0)).dense(40, 40)[0, 0]
    expected = by_loops(q[0], k[0], allowed, range(32, 40), 0.7, 1.5, bias[0])
    torch.testing.assert_close(ours.vertical[0], expected[0])
    torch.testing.assert_close(ours.slash[0], expected[1])


def test_a_bias_per_key_counts():
    q, k = qk()
    bias = torch.randn(1, 1, 1, 40, dtype=torch.float64)
    ours = sums(q, k, Context(mask=causal(), bias=bias), 8)
    allowed = causal().dense(40, 40)[0, 0]
    full = bias[0].expand(4, 40, 40)
    expected = by_loops(q[0], k[0], allowed, range(32, 40), bias=full)
    torch.testing.assert_close(ours.vertical[0], expected[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nothing(side):
    q, k = qk(batch=2)
    pads = torch.tensor([0, 11])
    if side == "left":
        places = torch.arange(40) - pads[:, None]
        ctx = Context(mask=causal() & padding([40, 29]), q_positions=places, kv_positions=places)
        real = slice(11, 40)
    else:
        ctx = Context(mask=causal() & padding([40, 29]))
        real = slice(0, 29)
    q[1, :, ~torch.isin(torch.arange(40), torch.arange(40)[real])] = 1e4
    k[1, :, ~torch.isin(torch.arange(40), torch.arange(40)[real])] = 1e4
    ours = sums(q, k, ctx, 8)
    alone = by_loops(q[1][:, real], k[1][:, real], causal().dense(29, 29)[0, 0], range(21, 29))
    torch.testing.assert_close(ours.vertical[1][:, real], alone[0])
    torch.testing.assert_close(ours.slash[1][:, :29], alone[1])
    assert ours.vertical[1].sum() == pytest.approx(4 * 8)
    full = by_loops(q[0], k[0], causal().dense(40, 40)[0, 0], range(32, 40))
    torch.testing.assert_close(ours.slash[0], full[1])


def test_a_chunk_uses_its_own_last_queries_and_all_earlier_keys():
    q, k = qk(q_len=13, kv_len=40)
    ours = sums(q, k, Context(mask=causal()), 8)
    expected = by_loops(q[0], k[0], causal().dense(13, 40)[0, 0], range(5, 13))
    torch.testing.assert_close(ours.vertical[0], expected[0])
    torch.testing.assert_close(ours.slash[0], expected[1])


def test_fewer_queries_than_asked_for():
    q, k = qk(q_len=3)
    ours = sums(q, k, Context(mask=causal()), 64)
    expected = by_loops(q[0], k[0], causal().dense(3, 40)[0, 0], range(3))
    torch.testing.assert_close(ours.slash[0], expected[1])


def test_masks_that_differ_by_head():
    q, k = qk()
    table = torch.rand(2, 40, 40) < 0.5
    table |= torch.eye(40).bool()
    ours = sums(q, k, Context(mask=causal() & blocks(table, 1)), 8)
    allowed = causal().dense(40, 40)[0, 0] & table
    for h in range(4):
        expected = by_loops(
            q[0, h : h + 1], k[0, h // 2 : h // 2 + 1], allowed[h // 2], range(32, 40)
        )
        torch.testing.assert_close(ours.vertical[0, h], expected[0][0])


def test_low_precision_is_estimated_in_fp32():
    q, k = qk(dtype=torch.bfloat16)
    ours = sums(q, k, Context(mask=causal()), 8)
    expected = by_loops(q[0], k[0], causal().dense(40, 40)[0, 0], range(32, 40))
    assert ours.vertical.dtype == torch.float32
    torch.testing.assert_close(ours.vertical[0].double(), expected[0], atol=1e-6, rtol=1e-5)


def test_documents_are_kept_apart():
    q, k = qk()
    mask = causal() & documents([0, 25, 40])
    ours = sums(q, k, Context(mask=mask), 8)
    assert not ours.vertical[0, :, :25].any()
    assert not ours.slash[0, :, 15:].any()


@pytest.mark.parametrize("budget", [1 << 21, 1500, 200], ids=["at once", "two heads", "row by row"])
def test_steps_of_any_size_rows_that_see_nothing_and_any_strides(monkeypatch, budget):
    monkeypatch.setattr(module, "_BUDGET", budget)
    storage = torch.randn(40, 8, 10, dtype=torch.float64)  # heads innermost
    q, k = storage.permute(2, 0, 1)[None], torch.randn(1, 5, 40, 8, dtype=torch.float64)
    table = (torch.rand(1, 40, 40) < 0.5) | torch.eye(40).bool()
    table[0, [33, 35]] = False
    ours = sums(q, k, Context(mask=causal() & blocks(table, 1), softcap=2.0), 8)
    allowed = causal().dense(40, 40)[0, 0] & table[0]
    vertical, slash = by_loops(q[0], k[0], allowed, range(32, 40), softcap=2.0)
    torch.testing.assert_close(ours.vertical[0], vertical)
    torch.testing.assert_close(ours.slash[0], slash)
    assert vertical.sum() == pytest.approx(10 * 6)
