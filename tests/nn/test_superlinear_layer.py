"""Superlinear attention in a layer and a model, and the recurrent layer that stands before it."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate import causal, padding
from foveate.nn import GatedEMA
from foveate.ops.errors import InputError


def layer(attention="superlinear(index=1)", projection="gqa(kv_heads=2)"):
    return foveate.Attention(32, 4, projection, attention, "none").eval()


@pytest.mark.parametrize("projection", ["mha", "gqa(kv_heads=2)", "mqa", "mfa(head_dim=8)"])
@pytest.mark.parametrize("cuts", [(1,) * 50, (23, 1, 1, 25)])
def test_decoding_equals_the_full_forward(projection, cuts):
    made, x = layer(projection=projection), torch.randn(2, 50, 32)
    want = made(x, mask=causal()).y
    cache = made.new_cache()
    with torch.no_grad():
        got = [made(part, mask=causal(), cache=cache).y for part in x.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-5)


def test_padding_in_front_changes_nothing_when_decoding():
    made, x = layer(), torch.randn(2, 40, 32)
    at = torch.arange(40) - torch.tensor([[0], [8]])
    alone = made(x[1:, 8:], mask=causal()).y
    cache = made.new_cache()
    got = []
    with torch.no_grad():
        for start, stop in ((0, 31), (31, 32), (32, 40)):
            ctx = foveate.Context(
                mask=causal() & padding([stop, stop - 8]),
                q_positions=at[:, start:stop],
                kv_positions=at[:, :stop],
            )
            got.append(made(x[:, start:stop], ctx=ctx, cache=cache).y)
    torch.testing.assert_close(torch.cat(got, 1)[1:, 8:], alone, atol=1e-5, rtol=1e-5)


def test_a_layer_has_no_rotary_positions():
    made = foveate.Attention(32, 4, "mha", "superlinear", "rope")
    assert made.rope is None  # routing queries aren't turned, so keys mustn't be


def test_training_reaches_every_weight():
    made, x = layer().train(), torch.randn(2, 60, 32)
    made(x, mask=causal()).y.square().sum().backward()
    for name, weight in made.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


def test_a_model_trains_saves_and_generates(tmp_path):
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    from foveate.models import FoveateConfig, FoveateForCausalLM

    model = FoveateForCausalLM(
        FoveateConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            position="none",
            projection="gqa(kv_heads=2)",
            attention="superlinear(index=1)",
        )  # fmt: skip
    )
    ids = torch.randint(256, (2, 30))
    model.train()(ids, labels=ids).loss.backward()
    model.eval().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    wanted = ids
    for _ in range(5):
        logits = model(wanted, use_cache=False).logits[:, -1]
        wanted = torch.cat((wanted, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), wanted)
    model.generate(ids, max_new_tokens=4, num_beams=3)


# -- the moving average ----------------------------------------------------------------------------
def one_by_one(made, x, real=None):
    a = torch.sigmoid(made.decay)
    h = torch.zeros(len(x), len(a), dtype=x.dtype)
    out = []
    for t in range(x.shape[1]):
        new = a * h + (1 - a) * made.inner(x[:, t])
        h = new if real is None else torch.where(real[:, t, None], new, h)
        out.append(made.out(torch.nn.functional.silu(made.gate(x[:, t])) * h))
    return torch.stack(out, 1), h


@pytest.mark.parametrize("length", [1, 63, 64, 150])
def test_runs_of_a_moving_average_are_its_recurrence(length):
    made, x = GatedEMA(12, 20).double(), torch.randn(3, length, 12, dtype=torch.float64)
    y, h = made(x)
    want, last = one_by_one(made, x)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(h, last)


def test_a_moving_average_goes_on_from_its_state():
    made, x = GatedEMA(12), torch.randn(2, 100, 12)
    whole, last = made(x)
    h, parts = None, []
    for part in x.split((70, 1, 1, 28), 1):
        y, h = made(part, h)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(h, last)


def test_padding_leaves_the_state_of_a_moving_average():
    made, x = GatedEMA(12).double(), torch.randn(2, 90, 12, dtype=torch.float64)
    real = torch.rand(2, 90) < 0.7
    y, h = made(x, real=real)
    want, last = one_by_one(made, x, real)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(h, last)
    bad = x.masked_fill(~real[..., None], float("nan"))
    torch.testing.assert_close(made(bad, real=real)[1], last)


def test_memories_that_make_no_sense_are_refused():
    for bad in ({"shortest": 1.0}, {"longest": 1.5}, {"longest": float("inf")}):
        with pytest.raises(InputError, match="shortest"):
            GatedEMA(4, **bad)
