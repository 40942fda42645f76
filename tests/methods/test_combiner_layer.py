"""Combiner as a layer: gradients, padding, precision, decoding, refusals."""

from __future__ import annotations

import pytest
import torch
from combiner_models import ALL, CAUSAL, FORMS, LENGTH, built, context, tensors

import foveate
from foveate import Context, causal, padding
from foveate.methods import make
from foveate.methods.combiner import Combiner
from foveate.ops.errors import InputError
from foveate.parts import StateCache


# -- shapes, dtypes, padding, gradients ------------------------------------------------------------
@ALL
def test_gradients_are_those_of_the_definition_in_numbers(fields):
    q, k, v = (x.requires_grad_() for x in tensors(11, batch=1, group=1, dim=2))
    x = torch.randn(1, 11, 32, dtype=q.dtype, requires_grad=True)
    method = built(q, k, v, **fields)

    def run(q, k, v, x):
        return method(q, k, v, Context(mask=causal(), hidden=x)).out

    assert torch.autograd.gradcheck(run, (q, k, v, x), fast_mode=True)


@ALL
@pytest.mark.parametrize("side", ["left", "right"])
@FORMS
def test_padding_is_never_read_and_a_row_alone_is_the_same(fields, side, form):
    q, k, v = tensors()
    x = torch.randn(2, LENGTH, 32, dtype=q.dtype)
    pads = torch.tensor([0, 9])
    index = torch.arange(LENGTH)[None]
    mask = padding(LENGTH - pads)
    mask = causal() & mask if form == "causal" else mask
    at = index - pads[:, None] if side == "left" else None
    ctx = Context(mask=mask, q_positions=at, kv_positions=at, hidden=x)
    method = built(q, k, v, **fields)
    out = method(q, k, v, ctx).out
    real = slice(9, None) if side == "left" else slice(0, LENGTH - 9)
    alone = context(form)
    alone.hidden = x[1:, real]
    expected = method(*(t[1:, :, real] for t in (q, k, v)), alone).out
    torch.testing.assert_close(out[1:, :, real], expected, atol=1e-11, rtol=1e-11)
    assert out.isfinite().all()


@ALL
@pytest.mark.parametrize(("dtype", "band"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_low_precision(fields, dtype, band):
    q, k, v = (t.to(dtype) for t in tensors(dim=16))
    method = built(q, k, v, **fields)
    x = torch.randn(2, LENGTH, 32).to(dtype)
    out = method(q, k, v, Context(mask=causal(), hidden=x)).out
    exact = method.double()
    if fields["partition"] == "learnable":
        exact.partitions[0].assign = lambda k: built_ids
        built_ids = method.to(dtype).partitions[0].__class__.assign(method.partitions[0], k)
        exact = method.double()
    wide = exact(q.double(), k.double(), v.double(), Context(mask=causal(), hidden=x.double())).out
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wide, atol=band, rtol=band)


def test_dropout_drops_and_keeps_the_mean():
    q, k, v = tensors(16, batch=1)
    method = built(q, k, v)
    ctx = Context(mask=causal(), dropout=0.5, phase="train")
    some = torch.stack([method(q, k, v, ctx).out for _ in range(400)])
    plain = method(q, k, v, CAUSAL).out
    assert (some[0] - plain).abs().max() > 0.1
    assert (some.mean(0) - plain).abs().mean() < 0.05


# -- decoding --------------------------------------------------------------------------------------
def layer(fields, position="none"):
    # proj keys have no rotation, and neither has this layer
    torch.manual_seed(1)
    spec = Combiner(**({"size": 5} | fields))
    return foveate.Attention(32, 4, "gqa(kv_heads=2)", spec, position=position).double().eval()


@ALL
@pytest.mark.parametrize("cuts", [(37,), (1,) * 37, (3, 1, 1, 1, 7, 24), (20, 1, 16)])
def test_decoding_equals_the_full_forward(fields, cuts):
    made, x = layer(fields), torch.randn(2, 37, 32, dtype=torch.float64)
    want = made(x, mask=causal()).y
    cache = made.new_cache()
    with torch.no_grad():
        found = [made(part, mask=causal(), cache=cache).y for part in x.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(found, 1), want, atol=1e-11, rtol=1e-11)
    assert isinstance(cache, StateCache)
    assert len(cache) == 37


@ALL
def test_decoding_with_left_padding_and_beams(fields):
    made, x = layer(fields), torch.randn(2, 23, 32, dtype=torch.float64)
    pads = torch.tensor([0, 4])
    at = torch.arange(23) - pads[:, None]

    def ctx(start, stop):
        return Context(
            mask=causal() & padding(stop - pads),
            q_positions=at[:, start:stop],
            kv_positions=at[:, :stop],
        )

    want = made(x, ctx=ctx(0, 23)).y
    cache = made.new_cache()
    with torch.no_grad():
        first = made(x[:, :8], ctx=ctx(0, 8), cache=cache).y
        rest = [made(x[:, t : t + 1], ctx=ctx(t, t + 1), cache=cache).y for t in range(8, 20)]
        found = torch.cat([first, *rest], 1)
        torch.testing.assert_close(found[0], want[0, :20], atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(found[1, 4:], want[1, 4:20], atol=1e-11, rtol=1e-11)
        beams = torch.tensor([1, 0, 1])
        cache.reorder(beams)
        assert cache.batch == 3
        pads, at, x = pads[beams], at[beams], x[beams]
        last = made(x[:, 20:], ctx=ctx(20, 23), cache=cache).y
    torch.testing.assert_close(last, want[beams, 20:], atol=1e-11, rtol=1e-11)


def held(fields, length):
    made = layer(fields)
    cache = made.new_cache()
    with torch.no_grad():
        made(torch.randn(1, length, 32, dtype=torch.float64), mask=causal(), cache=cache)
    return cache


def test_fixed_keeps_a_block_and_a_summary_of_each_block():
    # keys 2 x 8 and values 2 x 8 of the open block, the pooled queries 4 x 8; k_S 2 x 8, u_S 4 x 8
    for length in (160, 163):
        cache = held({"size": 16}, length)
        blocks, rest = divmod(length, 16)
        numbers = rest * 32 + (32 if rest else 0) + blocks * 48
        assert cache.bytes() == 8 * numbers
        assert cache.elements_per_token == 0


def test_a_state_refuses_to_go_back_and_forgets():
    cache = held({}, 12)
    with pytest.raises(InputError, match="none can be taken back"):
        cache.truncate(7)
    cache.reset()
    assert (len(cache), cache.bytes(), cache.batch) == (0, 0, None)


# -- refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"partition": "diagonal"}, "expected fixed"),
        ({"partition": []}, "expected fixed"),
        ({"size": 0}, "at least 1"),
        ({"pooling": "max"}, "identity-max"),
        ({"mixture": "sum"}, "average or joint"),
        ({"partition": "fixed", "mixture": "joint"}, "direct tokens are the same"),
        ({"key": "q"}, "proj"),
        ({"momentum": 2.0}, "0 to 1"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Combiner(**fields)


def test_calls_without_a_meaning_are_refused():
    q, k, v = tensors()
    method = built(q, k, v)
    with pytest.raises(InputError, match="own queries"):
        method(q[:, :, -1:], k, v, CAUSAL)
    with pytest.raises(InputError, match="whole sequences"):
        method(q, k, v, Context(mask=foveate.window(3, 0)))
    for name, value in (("bias", torch.zeros(1, 1, 1, LENGTH)), ("softcap", 5.0)):
        with pytest.raises(InputError, match=name):
            method(q, k, v, Context(mask=causal(), **{name: value}))
    cached = layer({})
    with pytest.raises(InputError, match="causal mask"):
        cached(torch.randn(1, 4, 32, dtype=torch.float64), cache=cached.new_cache())


def test_the_text_form_makes_a_recipe():
    assert make("combiner(partition='mixture', size=16)") == Combiner("mixture", 16)


def test_centroids_move_in_training_only():
    made = layer({"partition": "learnable", "momentum": 0.5})
    before = made.attention.partitions[0].centroids.mu.clone()
    x = torch.randn(2, 37, 32, dtype=torch.float64)
    made(x, mask=causal())
    assert torch.equal(made.attention.partitions[0].centroids.mu, before)
    made.train()(x, mask=causal())
    after = made.attention.partitions[0].centroids.mu
    assert not torch.equal(after, before)
    torch.testing.assert_close(after.norm(dim=-1), torch.ones_like(after[..., 0]))
