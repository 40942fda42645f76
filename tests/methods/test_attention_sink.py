"""The oracles of the spec attention-sink that concern masks, caches and sink logits."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.methods.attention_sink import SinkWindow
from foveate.methods.full import Full
from foveate.methods.mminference import AShape
from foveate.ops import (
    AttentionOutput,
    attention,
    blocks,
    causal,
    documents,
    merge,
    padding,
    window,
)
from foveate.parts import Context, Rope


def qkv(batch=2, q_len=61, kv_len=61, dtype=torch.float64):
    shapes = (batch, 4, q_len, 16), (batch, 2, kv_len, 16), (batch, 2, kv_len, 24)
    return tuple(torch.randn(s, dtype=dtype) for s in shapes)


def streaming_table(sinks, window, q_len, kv_len):
    """J <= i and (j < sinks or i - j < window), in loops."""
    rows = [i + kv_len - q_len for i in range(q_len)]
    return torch.tensor(
        [[j <= i and (j < sinks or i - j < window) for j in range(kv_len)] for i in rows]
    )


def by_definition(q, k, v, table) -> AttentionOutput:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~table, -torch.inf)
    return AttentionOutput(scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1))


# -- oracle 1 and 3: sink logits ---------------------------------------------------------------
def test_oracle_1_a_sink_of_minus_50_is_softmax():
    q, k, v = qkv()
    sunk = attention(q, k, v, causal(), sink_logits=torch.full((4,), -50.0, dtype=q.dtype))
    plain = by_definition(q, k, v, causal().dense(61, 61))
    torch.testing.assert_close(sunk.out, plain.out, atol=1e-14, rtol=1e-14)


def test_oracle_1_worked_example():
    """Logits [0, ln 3] and b = 0: weights [0.2, 0.6], the rest is the sink's."""
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64).reshape(1, 1, 2, 1)
    v = torch.eye(2, dtype=torch.float64)[None, None]
    sunk = attention(q, k, v, scale=1.0, sink_logits=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(
        sunk.out.flatten(), torch.tensor([0.2, 0.6], dtype=torch.float64), atol=1e-15, rtol=0
    )
    assert float(sunk.lse) == pytest.approx(math.log(5.0), abs=1e-15)


@pytest.mark.parametrize("method", [Full(), SinkWindow(2, 9)], ids=repr)
def test_oracle_1_the_sink_is_a_column_that_is_dropped_and_a_sigmoid_of_the_lse(method):
    q, k, v = qkv()
    b = torch.randn(4, dtype=torch.float64)
    sunk = method(q, k, v, Context(mask=causal(), sink_logits=b))
    table = causal().dense(61, 61)
    if isinstance(method, SinkWindow):
        table = streaming_table(2, 9, 61, 61)
    plain = by_definition(q, k, v, table)
    identity = plain.out * torch.sigmoid(plain.lse - b[None, :, None])[..., None]
    torch.testing.assert_close(sunk.out, identity, atol=1e-14, rtol=1e-14)
    # Definition: one more column of scores, softmax, the column dropped.
    wide = k.repeat_interleave(2, 1)
    scores = (q @ wide.mT / 4.0).masked_fill(~table, -torch.inf)
    column = b[None, :, None, None].expand(2, 4, 61, 1)
    weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(
        sunk.out, weights @ v.repeat_interleave(2, 1), atol=1e-14, rtol=1e-14
    )


@pytest.mark.parametrize("mask", [causal(), window(9, 0)], ids=repr)
def test_oracle_2_a_key_without_a_value_is_a_sink_of_its_score(mask):
    """One more key k' that all see, with v' = 0: a sink of b_i = q_i . k' / sqrt(d) per query."""
    q, k, v = qkv()
    extra = torch.randn(2, 2, 1, 16, dtype=q.dtype)
    nothing = torch.zeros(2, 2, 1, 24, dtype=q.dtype)
    table = torch.cat((torch.ones(61, 1, dtype=torch.bool), mask.dense(61, 61)[0, 0]), 1)
    wider = torch.cat((extra, k), 2), torch.cat((nothing, v), 2)
    with_key = attention(q, *wider, blocks(table, 1))
    plain = attention(q, k, v, mask)
    b = (q @ extra.repeat_interleave(2, 1).mT)[..., 0] / math.sqrt(16)
    scaled = plain.out * torch.sigmoid(plain.lse - b)[..., None]
    torch.testing.assert_close(with_key.out, scaled, atol=1e-12, rtol=0)
    parts = [plain, attention(q, extra, nothing)]
    torch.testing.assert_close(merge(parts).out, scaled, atol=1e-12, rtol=0)
    torch.testing.assert_close(merge(parts).lse, with_key.lse, atol=1e-12, rtol=0)
    exact = by_definition(q, *wider, table)
    torch.testing.assert_close(with_key.out, exact.out, atol=1e-12, rtol=0)


def test_oracle_2_a_key_that_scores_alike_with_all_queries_is_a_sink_per_head():
    q, k, v = qkv()
    b = torch.randn(4, dtype=q.dtype)
    # A dimension that is 1 in all queries and 0 in all keys but k'; so k' has a score per head.
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    q, k = torch.cat((q, torch.ones_like(q[..., :1])), -1), torch.nn.functional.pad(k, (0, 1))
    extra = torch.nn.functional.pad(b[None, :, None, None].expand(2, 4, 1, 1), (16, 0))
    keys, values = torch.cat((extra, k), 2), torch.nn.functional.pad(v, (0, 0, 1, 0))
    table = torch.nn.functional.pad(causal().dense(61, 61)[0, 0], (1, 0), value=True)
    with_key = attention(q, keys, values, blocks(table, 1), scale=1.0)
    sunk = attention(q, k, v, causal(), scale=1.0, sink_logits=b)
    torch.testing.assert_close(with_key.out, sunk.out, atol=1e-12, rtol=0)
    torch.testing.assert_close(with_key.lse, sunk.lse, atol=1e-12, rtol=0)


def test_oracle_2_gpt_oss_eager():
    """transformers' own eager function of the model with sink logits."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v = qkv()
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    module.sinks = torch.nn.Parameter(torch.randn(4, dtype=q.dtype))
    hidden = torch.zeros(61, 61, dtype=q.dtype).masked_fill(~causal().dense(61, 61), -torch.inf)
    theirs, _ = gpt_oss.eager_attention_forward(module, q, k, v, hidden, scaling=0.3)
    ours = attention(q, k, v, causal(), scale=0.3, sink_logits=module.sinks)
    torch.testing.assert_close(ours.out.transpose(1, 2), theirs, atol=1e-12, rtol=0)


def test_oracle_3_shifting_all_logits_is_lowering_the_sink():
    q, k, v = qkv()
    b, c = torch.randn(4, dtype=torch.float64), 1.7
    ctx = Context(mask=causal(), sink_logits=b, bias=torch.full((1, 1, 1, 61), c, dtype=q.dtype))
    shifted = SinkWindow(2, 9)(q, k, v, ctx)
    lowered = SinkWindow(2, 9)(q, k, v, Context(mask=causal(), sink_logits=b - c))
    torch.testing.assert_close(shifted.out, lowered.out, atol=1e-14, rtol=1e-14)
    plain = SinkWindow(2, 9)(q, k, v, Context(mask=causal(), sink_logits=b))
    assert (shifted.out - plain.out).abs().max() > 1e-2


# -- oracle 5: streaming -------------------------------------------------------------------------
@pytest.mark.parametrize(("sinks", "window"), [(4, 57), (4, 60), (0, 61), (61, 1), (30, 40)])
def test_oracle_5_room_for_all_is_dense(sinks, window):
    q, k, v = qkv()
    method, ctx = SinkWindow(sinks, window), Context(mask=causal())
    assert torch.equal(method.layout(q, k, v, ctx).dense()[0, 0], causal().dense(61, 61)[0, 0])
    ours = method(q, k, v, ctx)
    expected = by_definition(q, k, v, causal().dense(61, 61))
    torch.testing.assert_close(ours.out, expected.out, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("sinks", "window"), [(4, 12), (0, 5), (1, 1), (7, 30)])
@pytest.mark.parametrize("q_len", [61, 13, 1])
def test_the_mask_is_the_sheets(sinks, window, q_len):
    q, k, v = qkv(q_len=q_len)
    method, ctx = SinkWindow(sinks, window), Context(mask=causal())
    table = streaming_table(sinks, window, q_len, 61)
    assert torch.equal(method.layout(q, k, v, ctx).dense()[0, 0], table)
    ours, expected = method(q, k, v, ctx), by_definition(q, k, v, table)
    torch.testing.assert_close(ours.out, expected.out, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours.lse, expected.lse)


@pytest.mark.parametrize("chunk", [1, 3, 12])
def test_oracle_5_the_cache_without_reindexing_is_the_mask_view(chunk):
    """Each chunk's last query sees in the cache what the mask shows it."""
    q, k, v = qkv(q_len=60, kv_len=60)
    rope = Rope.of(16)
    places = torch.arange(60)
    q, k = rope.rotate(q, places), rope.rotate(k, places)
    method = SinkWindow(4, 12)
    expected = method(q, k, v, Context(mask=causal()))
    cache = method.cache()
    for at in range(0, 60, chunk):
        part = slice(at, at + chunk)
        keys, values = cache.update(k[:, :, part], v[:, :, part])
        ours = attention(q[:, :, part], keys, values, causal())
        last = at + chunk - 1
        torch.testing.assert_close(
            ours.out[:, :, -1], expected.out[:, :, last], atol=1e-12, rtol=1e-12
        )


def test_oracle_5_reindexing_changes_only_how_far_the_sinks_are():
    """Without sinks, re-indexed or not is the same; with them it isn't, once tokens are dropped."""
    q, k, v = qkv(q_len=60, kv_len=60)
    rope, places = Rope.of(16), torch.arange(60)
    turned = rope.rotate(q, places), rope.rotate(k, places)
    for sinks, alike in ((0, True), (4, False)):
        method = SinkWindow(sinks, 12)
        view = method(*turned, v, Context(mask=causal())).out
        cache = method.cache(rope, rotated=True)
        outs = []
        for at in range(60):
            one = slice(at, at + 1)
            kept = cache.update(turned[1][:, :, one], v[:, :, one])
            outs.append(attention(turned[0][:, :, one], *kept, causal()).out)
        gap = (torch.cat(outs, 2) - view).abs().amax((0, 1, 3))
        assert gap[:16].max() < 1e-12
        assert bool(gap[17:].max() < 1e-12) is alike


# -- within the mask, whatever it is -----------------------------------------------------------
def test_packed_documents_and_windows_of_the_model_stay_in_force():
    q, k, v = qkv()
    mask = causal() & documents([0, 20, 61]) & window(14, -1)
    table = mask.dense(61, 61)[0, 0] & streaming_table(25, 9, 61, 61)
    ours = SinkWindow(25, 9)(q, k, v, Context(mask=mask))
    torch.testing.assert_close(ours.out, by_definition(q, k, v, table).out)


def test_with_left_padding_the_sinks_are_each_rows_first_real_tokens():
    q, k, v = qkv()
    places = torch.arange(61) - torch.tensor([[0], [17]])
    ctx = Context(mask=causal() & padding([61, 44]), q_positions=places, kv_positions=places)
    ours = SinkWindow(3, 8)(q, k, v, ctx)
    alone = [x[1:, :, 17:] for x in (q, k, v)]
    expected = by_definition(*alone, streaming_table(3, 8, 44, 44))
    torch.testing.assert_close(ours.out[1:, :, 17:], expected.out)
    assert not ours.out[1, :, :17].any()


def test_both_ways_the_window_reaches_as_far_ahead():
    q, k, v = qkv()
    ours = SinkWindow(3, 8)(q, k, v, Context())
    table = torch.tensor([[j < 3 or abs(i - j) < 8 for j in range(61)] for i in range(61)])
    torch.testing.assert_close(ours.out, by_definition(q, k, v, table).out)


@pytest.mark.parametrize(
    "method", [SinkWindow(0, 10), SinkWindow(0, 100), AShape(0, 10), AShape(0, 100)], ids=repr
)
def test_more_queries_than_keys_run_what_the_layout_says(method):
    q, k, v = qkv(q_len=100, kv_len=10)
    ctx = Context()
    table = method.layout(q, k, v, ctx).dense()
    torch.testing.assert_close(method(q, k, v, ctx).out, by_definition(q, k, v, table).out)


@pytest.mark.parametrize("mask", [causal(), None, causal() & window(7, 0)], ids=repr)
def test_full_is_exact_under_any_mask(mask):
    q, k, v = qkv()
    table = torch.ones(61, 61).bool() if mask is None else mask.dense(61, 61)
    ours, expected = Full()(q, k, v, Context(mask=mask)), by_definition(q, k, v, table)
    torch.testing.assert_close(ours.out, expected.out)
    torch.testing.assert_close(ours.lse, expected.lse)
    assert torch.equal(
        Full().layout(q, k, v, Context(mask=mask)).dense().expand(1, 1, -1, -1)[0, 0],
        table.reshape(61, 61),
    )


def test_full_takes_a_boolean_table_per_head():
    q, k, v = qkv()
    table = torch.rand(2, 4, 61, 61) < 0.5
    ours = Full()(q, k, v, Context(mask=blocks(table, 1)))
    torch.testing.assert_close(ours.out, by_definition(q, k, v, table).out)
