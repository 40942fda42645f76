"""The contracts: Context refuses nonsense, patterns tell their stats, layouts are kept."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from foveate.methods.attention_sink import SinkWindow
from foveate.methods.full import Full
from foveate.methods.mminference import AShape
from foveate.ops import Layout, attention, blocks, causal, padding, sinks, window
from foveate.ops.errors import InputError
from foveate.parts import Attention, Context, Pattern
from foveate.parts.attention import mask_layout


@dataclass(frozen=True)
class Band(Pattern):
    width: int = 8
    dense: bool = False

    def is_dense(self, q, k, ctx) -> bool:
        return self.dense

    def layout(self, q, k, v, ctx) -> Layout:
        return mask_layout(ctx.mask & window(self.width - 1, 0), q, k, ctx)


def qkv(batch=2, q_len=50, kv_len=50, dtype=torch.float64):
    shapes = (batch, 4, q_len, 8), (batch, 2, kv_len, 8), (batch, 2, kv_len, 8)
    return tuple(torch.randn(s, dtype=dtype) for s in shapes)


def test_a_context_is_mostly_empty_and_stores_are_not_shared():
    one, two = Context(), Context()
    assert one.mask is None
    assert one.phase == "prefill"
    one.store["key"] = 1
    assert two.store == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"mask": torch.ones(2, 2)}, "blocks"), ({"phase": "training"}, "train, prefill, decode")],
)
def test_a_context_refuses_what_it_cannot_mean(fields, message):
    with pytest.raises(InputError, match=message):
        Context(**fields)


def test_contracts_cannot_be_made_bare():
    for kind in (Attention, Pattern):
        with pytest.raises(TypeError, match="abstract"):
            kind()


def test_what_the_model_asks_of_the_core_op_reaches_it():
    q, k, v = qkv()
    asked = {
        "scale": 0.3,
        "softcap": 2.0,
        "sink_logits": torch.randn(4, dtype=torch.float64),
        "bias": torch.randn(1, 4, 50, 50, dtype=torch.float64),
    }
    ours = Band()(q, k, v, Context(mask=causal(), backend="reference", **asked))
    band = (causal() & window(7, 0)).dense(50, 50)
    theirs = attention(q, k, v, blocks(band, 1), backend="reference", **asked)
    torch.testing.assert_close(ours.out, theirs.out)
    torch.testing.assert_close(ours.lse, theirs.lse)


@pytest.mark.parametrize("dense", [False, True])
def test_stats_hear_the_layout_and_both_times(dense):
    heard = []
    ctx = Context(mask=causal(), layer=7, stats=lambda **facts: heard.append(facts))
    Band(dense=dense)(*qkv(), ctx)
    (facts,) = heard
    assert facts["layer"] == 7
    assert facts["layout"].pairs == (50 * 51 / 2 if dense else 50 * 8 - 28)
    assert facts["build_seconds"] >= 0
    assert facts["attend_seconds"] > 0


def test_layers_of_one_forward_share_layouts_with_positions():
    q, k, _ = qkv()
    mask = causal() & padding([50, 40])
    places = torch.arange(50) - torch.tensor([[0], [10]])
    ctx = Context(q_positions=places, kv_positions=places)
    first = mask_layout(mask, q, k, ctx)
    again = Context(q_positions=places.clone(), kv_positions=places, store=ctx.store)
    assert mask_layout(mask, q, k, again) is first
    other = Context(q_positions=places - 1, kv_positions=places, store=ctx.store)
    assert mask_layout(mask, q, k, other) is not first
    assert mask_layout(mask & sinks(1), q, k, ctx) is not first
    assert mask_layout(mask, q, k, ctx, 16).q_tile == 16


def test_a_dense_call_with_positions_uses_them():
    q, k, v = qkv()
    places = torch.arange(50) - torch.tensor([[0], [10]])
    ctx = Context(mask=causal() & padding([50, 40]), q_positions=places, kv_positions=places)
    result = Band(dense=True)(q, k, v, ctx)
    alone = attention(q[1:, :, 10:], k[1:, :, 10:], v[1:, :, 10:], causal(), backend="reference")
    torch.testing.assert_close(result.out[1:, :, 10:], alone.out)
    assert not result.out[1, :, :10].any()


@pytest.mark.plain_empty
@pytest.mark.parametrize(
    "method", [Full(), SinkWindow(2, 9), SinkWindow(2, 99), AShape(2, 9)], ids=repr
)
@pytest.mark.parametrize("stats", [None, print], ids=["", "stats"])
def test_a_pattern_of_positions_compiles_whole(method, stats):
    def run(q, k, v):
        return method(q, k, v, Context(mask=causal(), stats=stats)).out

    torch._dynamo.reset()
    q, k, v = (torch.randn(1, h, 60, 16, requires_grad=True) for h in (4, 2, 2))
    ours = torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v)
    plain = method(q, k, v, Context(mask=causal())).out
    torch.testing.assert_close(ours, plain)
    weight = torch.randn_like(plain)
    grads = (torch.autograd.grad(x, (q, k, v), weight) for x in (ours, plain))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("mask", [None, causal()], ids=repr)
@pytest.mark.parametrize("method", [SinkWindow(2, 9), AShape(2, 9)], ids=repr)
def test_the_rule_says_what_the_layout_says(method, mask):
    q = torch.zeros(1, 2, 60, 16)
    ctx = Context(mask=mask)
    assert torch.equal(method.layout(q, q, q, ctx).dense(), method.rule(ctx).dense(60, 60))
