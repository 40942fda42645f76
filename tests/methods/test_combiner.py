"""Combiner by its definition: the spec's oracles."""

from __future__ import annotations

import combiner_reference as by
import pytest
import torch
from combiner_models import ALL, CAUSAL, FORMS, LENGTH, LISTS, built, context, tensors
from torch import nn

import foveate
from foveate import Context, attention, causal
from foveate.ops.errors import InputError


# -- the definition ------------------------------------------------------------------------------
@FORMS
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("length", [1, 5, 8, LENGTH])
def test_oracle_1_equals_the_explicit_partition_lists(name, form, length):
    q, k, v = tensors(length, batch=1)
    out = built(q, k, v, partition=name)(q, k, v, context(form)).out
    expected = by.combined(q, k, v, LISTS[name], form == "causal")
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", LISTS)
def test_oracle_1_at_lengths_of_many_tiles(name):
    q, k, v = tensors(150, batch=1, group=1)
    out = built(q, k, v, partition=name, size=12)(q, k, v, CAUSAL).out
    lists = {"fixed": by.blocks(12), "vertical": by.vertical(12), "horizontal": by.horizontal(12)}
    expected = by.combined(q, k, v, lists.get(name, by.logsparse))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


@FORMS
@pytest.mark.parametrize("length", [1, 7, 70, 150])
def test_oracle_1_learnable_equals_the_lists_of_its_clusters(form, length):
    q, k, v = tensors(length, batch=1)
    method = built(q, k, v, partition="learnable", clusters=5)
    ids = method.partitions[0].assign(k)
    lists = [[by.clusters(ids[b, h].tolist()) for h in range(2)] for b in range(1)]
    out = method(q, k, v, context(form)).out
    expected = by.combined(q, k, v, lists, form == "causal")
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


@FORMS
@pytest.mark.parametrize("name", ["fixed", "logsparse", "vertical", "horizontal", "learnable"])
@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ("identity-mean", lambda x: x.mean(0)),
        ("identity-sum", lambda x: x.sum(0)),
        ("relu-max", lambda x: x.relu().amax(0)),
        ("relu-mean", lambda x: x.relu().mean(0)),
    ],
)
def test_other_abstractions_of_spans(name, form, pooling, pool):
    q, k, v = tensors(23, batch=1)
    method = built(q, k, v, partition=name, pooling=pooling, clusters=3)
    lists = LISTS.get(name)
    if lists is None:
        ids = method.partitions[0].assign(k)[0]
        lists = [[by.clusters(ids[h].tolist()) for h in range(2)]]
    out = method(q, k, v, context(form)).out
    expected = by.combined(q, k, v, lists, form == "causal", queries=pool)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["fixed", "logsparse", "vertical", "horizontal"])
def test_deepsets_have_a_map_for_queries_and_one_for_keys(name):
    q, k, v = tensors(23, batch=1)
    method = built(q, k, v, partition=name, pooling="deepsets-max")
    maps = [one.linear for one in (method.queries, method.keys)]
    queries, keys = ((lambda x, f=f: f(x).relu().amax(0)) for f in maps)
    out = method(q, k, v, CAUSAL).out
    expected = by.combined(q, k, v, LISTS[name], queries=queries, keys=keys)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    out.sum().backward()
    assert all(f.weight.grad.abs().max() > 0 for f in maps)


def rowmajor(q, k, v, m, key, is_causal=True):
    """Rowmajor by its definition; `key` (row, column, weights) gives a span's key, one head."""
    length, scale = len(q), q.shape[1] ** -0.5
    out = []
    for i in range(length):
        r, c = divmod(i, m)
        logits, values = [], []
        for j in range(length):
            if j // m == r and (j <= i or not is_causal):
                logits.append(q[i] @ k[j] * scale)
                values.append(v[j])
        for other in range(-(-length // m)):
            span = [j for j in range(length) if j // m == other]
            if (other < r) if is_causal else (other != r and other * m + c < length):
                p = torch.softmax(k[span] @ q[other * m + c] * scale, 0)
                logits.append(q[i] @ key(other * m + c, span, p) * scale)
                values.append(p @ v[span])
        out.append(torch.softmax(torch.stack(logits), 0) @ torch.stack(values))
    return torch.stack(out)


@FORMS
@pytest.mark.parametrize("key", ["none", "wsum"])
def test_rowmajor_summarises_rows_anew_for_each_column(key, form):
    # Without causality the last row is whole: the columns that it lacked would have no query.
    q, k, v = tensors(23 if form == "causal" else 25, batch=1)
    out = built(q, k, v, partition="rowmajor", key=key)(q, k, v, context(form)).out
    for h in range(4):
        keys = k[0, h // 2]

        def of(at, span, p, keys=keys):
            return keys[at] if key == "none" else p @ keys[span]

        expected = rowmajor(q[0, h], keys, v[0, h // 2], 5, of, form == "causal")
        torch.testing.assert_close(out[0, h], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("key", ["proj", "wsum_proj"])
def test_rowmajor_makes_keys_from_the_input(key):
    q, k, v = tensors(20, batch=1)
    x = torch.randn(1, 20, 32, dtype=q.dtype)
    method = built(q, k, v, partition="rowmajor", key=key)
    out = method(q, k, v, Context(mask=causal(), hidden=x)).out
    part = method.partitions[0]
    scale = 0.5
    made = torch.zeros(2, 20, 4, dtype=q.dtype)
    for at in range(20):
        span = list(range(at // 5 * 5, at // 5 * 5 + 5))
        inner = []
        for h in range(4):
            p = torch.softmax(k[0, h // 2, span] @ q[0, h, at] * scale, 0)
            inner.append(p @ (v if key == "proj" else k)[0, h // 2, span])
        hidden = nn.functional.layer_norm(x[0, at] + part.inner(torch.cat(inner)), (32,))
        made[:, at] = part.outer(hidden).view(2, 4)
    for h in range(4):
        keys = made[h // 2]
        expected = rowmajor(
            q[0, h], k[0, h // 2], v[0, h // 2], 5, lambda at, span, p, keys=keys: keys[at]
        )
        torch.testing.assert_close(out[0, h], expected, atol=1e-12, rtol=1e-12)
    with pytest.raises(InputError, match="input"):
        method(q, k, v, CAUSAL)


def test_oracle_2_blocks_of_one_and_of_all_are_exact_attention():
    q, k, v = tensors()
    exact = attention(q, k, v, causal(), backend="reference")
    for size in (1, LENGTH, 128):
        out, lse = built(q, k, v, size=size)(q, k, v, CAUSAL)
        torch.testing.assert_close(out, exact.out, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(lse, exact.lse, atol=1e-12, rtol=1e-12)
    log = built(q, k, v, partition="logsparse")
    out = log(q[:, :, :2], k[:, :, :2], v[:, :, :2], CAUSAL).out
    torch.testing.assert_close(out, exact.out[:, :, :2], atol=1e-12, rtol=1e-12)
    more = log(q, k, v, CAUSAL).out
    assert (more[:, :, 2] - exact.out[:, :, 2]).abs().max() > 1e-3


def matrix(method, q, k, ctx):
    """P of a method, read off by giving each token its own unit value."""
    eye = torch.eye(q.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return method(q, k, eye, ctx).out


NAMES = ["fixed", "logsparse", "vertical", "horizontal", "mixture", "learnable"]


@FORMS
@pytest.mark.parametrize(
    ("name", "mixture"), [*((name, "average") for name in NAMES), ("mixture", "joint")]
)
def test_oracle_3_rows_sum_to_one_and_everything_has_a_weight(name, form, mixture):
    q, k, _ = tensors(batch=1)
    eye = torch.eye(LENGTH, dtype=q.dtype).expand(1, 2, -1, -1)
    method = built(q, k, eye, partition=name, mixture=mixture, clusters=3)
    p = matrix(method, q, k, context(form))
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]), atol=1e-12, rtol=0)
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    assert torch.equal(p[0, 0] > 0, allowed.tril() if form == "causal" else allowed)


def test_oracle_3_blocks_off_the_diagonal_have_rank_one():
    q, k, _ = tensors(length=40, batch=1)
    eye = torch.eye(40, dtype=q.dtype).expand(1, 2, -1, -1)
    p = matrix(built(q, k, eye, size=8), q, k, CAUSAL)[0, 0]
    for b in range(1, 5):
        for r in range(b):
            values = torch.linalg.svdvals(p[8 * b : 8 * b + 8, 8 * r : 8 * r + 8])
            assert values[0] > 1e-6
            assert values[1] < 1e-10


@ALL
def test_oracle_4_later_tokens_change_nothing(fields):
    q, k, v = tensors()
    x = torch.randn(2, LENGTH, 32, dtype=q.dtype)
    method = built(q, k, v, **fields)
    once = method(q, k, v, Context(mask=causal(), hidden=x)).out
    for cut in (1, 12, 25, 36):
        changed = [t.clone() for t in (q, k, v)]
        for t in changed:
            t[:, :, cut:] = torch.randn_like(t[:, :, cut:])
        y = x.clone()
        y[:, cut:] = torch.randn_like(y[:, cut:])
        again = method(*changed, Context(mask=causal(), hidden=y)).out
        torch.testing.assert_close(again[:, :, :cut], once[:, :, :cut], atol=1e-12, rtol=1e-12)
        assert not torch.allclose(again[:, :, cut:], once[:, :, cut:])


WORKED = (
    [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]],
    [[0.0, 1.0], [1.0, 0.0], [1.0, -1.0], [0.0, 2.0]],
    [[1.0], [2.0], [3.0], [4.0]],
)


@pytest.mark.parametrize("name", ["fixed", "logsparse"])
def test_oracle_5_worked_example(name):
    q, k, v = (torch.tensor(x, dtype=torch.float64)[None, None] for x in WORKED)
    method = built(q, k, v, partition=name, size=2)
    out = method(q, k, v, CAUSAL).out.flatten()
    expected = torch.tensor([1.0, 1.330238, 1.793355, 3.131107], dtype=torch.float64)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    eye = torch.eye(4, dtype=q.dtype)[None, None]
    row = matrix(built(q, k, eye, partition=name, size=2), q, k, CAUSAL)[0, 0, 3]
    expected = torch.tensor([0.124128, 0.124128, 0.248255, 0.503490], dtype=torch.float64)
    torch.testing.assert_close(row, expected, atol=1e-6, rtol=0)


def test_oracle_6_a_span_of_equal_keys_weighs_as_one():
    q, k, _ = tensors(length=16, batch=1, group=1)
    k[:, :, :8] = k[:, :, :1]
    eye = torch.eye(16, dtype=q.dtype).expand(1, 2, -1, -1)
    p = matrix(built(q, k, eye, size=8), q, k, CAUSAL)[..., 8:, :8]
    torch.testing.assert_close(p, p.mean(-1, keepdim=True).expand_as(p), atol=1e-12, rtol=0)
    z = (q[:, :, 8:] @ k[:, :, 8:].mT / 2).exp().tril().sum(-1)
    one = (q[:, :, 8:] @ k[:, :, :1].mT / 2).exp()[..., 0]
    torch.testing.assert_close(p.sum(-1), one / (one + z), atol=1e-12, rtol=0)
    # With log |S| it has the mass that softmax would give it.
    heavy = matrix(built(q, k, eye, size=8, span_count_bias=True), q, k, CAUSAL)
    exact = torch.softmax((q @ k.mT / 2).masked_fill(~causal().dense(16, 16), -torch.inf), -1)
    torch.testing.assert_close(heavy, exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", LISTS)
def test_a_bias_of_log_count_by_the_lists(name):
    q, k, v = tensors(23, batch=1)
    for form in ("causal", "bidirectional"):
        out = built(q, k, v, partition=name, span_count_bias=True)(q, k, v, context(form)).out
        expected = by.combined(q, k, v, LISTS[name], form == "causal", log_count=True)
        torch.testing.assert_close(out, expected, atol=1e-7, rtol=1e-7)


def test_oracle_7_an_average_of_one_partition_is_that_partition():
    q, k, v = tensors()
    for name in LISTS:
        once = built(q, k, v, partition=name)(q, k, v, CAUSAL).out
        twice = built(q, k, v, partition=[name, name])(q, k, v, CAUSAL)
        torch.testing.assert_close(twice.out, once, atol=1e-12, rtol=1e-12)
        assert twice.lse.isnan().all()


def test_mixtures_average_or_share_their_direct_tokens():
    q, k, v = tensors(23, batch=1)
    one = by.combined(q, k, v, LISTS["vertical"])
    two = by.combined(q, k, v, LISTS["horizontal"])
    out = built(q, k, v, partition="mixture")(q, k, v, CAUSAL).out
    torch.testing.assert_close(out, (one + two) / 2, atol=1e-12, rtol=1e-12)
    # Joint: exp of direct logits once, and of both kinds of spans.
    a, b = (built(q, k, v, partition=name)(q, k, v, CAUSAL) for name in ("vertical", "horizontal"))
    method = built(q, k, v, partition="mixture", mixture="joint")
    shared = foveate.merge(method.partitions[0].direct(method._call(q, k, v, CAUSAL,
        method._tokens(q, k, CAUSAL))[1]))  # fmt: skip
    za, zb, zd = a.lse.exp(), b.lse.exp(), shared.lse.exp()
    z = za + zb - zd
    expected = (za[..., None] * a.out + zb[..., None] * b.out - zd[..., None] * shared.out) / z[
        ..., None
    ]
    torch.testing.assert_close(method(q, k, v, CAUSAL).out, expected, atol=1e-11, rtol=1e-11)
