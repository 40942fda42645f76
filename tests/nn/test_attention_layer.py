"""foveate.Attention: every projection decodes as it trains; what a layer owes."""

from __future__ import annotations

import pytest
import torch
from projections import DIM, HEADS, decoded, layer, rotated, softmax_attention, tokens
from torch.nn import functional

import foveate
from foveate import Context, catalog, causal, padding
from foveate.ops.errors import InputError, UnknownMethodError
from foveate.parts import SinkWindowCache

# TPLA's decoding isn't meant to equal an exact prefill; without that it must.
GIVEN = {"tpla": "tpla(pd_sep=False)"}
KEYS = [GIVEN.get(row.key, row.key) for row in catalog.rows() if row.kind == "projection"]
EVERY = pytest.mark.parametrize("key", KEYS)


# -- what holds for every projection ---------------------------------------------------------------
@EVERY
@pytest.mark.parametrize(("prompt", "chunk"), [(0, 1), (20, 1), (9, 5)])
def test_decoding_equals_the_full_forward(key, prompt, chunk):
    made, x = layer(key, torch.float32), tokens(dtype=torch.float32)
    whole = made(x, mask=causal()).y
    steps, cache = decoded(made, x, prompt, chunk)
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=0)
    assert len(cache) == x.shape[1]


@EVERY
def test_cache_bytes_are_those_declared(key):
    made, x = layer(key, torch.float32), tokens(dtype=torch.float32)
    _, cache = decoded(made, x, 30)
    assert cache.bytes() == cache.elements_per_token * 4 * x.shape[0] * x.shape[1]
    assert cache.fields == made.projection.fields


@EVERY
def test_causality_bit_by_bit(key):
    made, x = layer(key, torch.float32), tokens(dtype=torch.float32)
    other = x.clone()
    other[:, 21] += 1
    before, after = made(x, mask=causal()).y, made(other, mask=causal()).y
    assert torch.equal(before[:, :21], after[:, :21])
    assert not torch.equal(before[:, 21], after[:, 21])


@EVERY
def test_left_padding_changes_nothing(key):
    made, x = layer(key), tokens()
    pads = torch.tensor([0, 5])
    positions = torch.arange(x.shape[1])[None] - pads[:, None]
    ctx = Context(
        mask=causal() & padding(x.shape[1] - pads), q_positions=positions, kv_positions=positions
    )
    y = made(x, ctx=ctx).y
    torch.testing.assert_close(y[1:, 5:], made(x[1:, 5:], mask=causal()).y)
    torch.testing.assert_close(y[:1], made(x[:1], mask=causal()).y)


@EVERY
def test_decoding_a_padded_batch(key):
    made, x = layer(key), tokens(20)
    pads = torch.tensor([0, 5])
    positions = torch.arange(20)[None] - pads[:, None]
    cache, parts = made.new_cache(), []
    with torch.no_grad():
        for start, stop in [(0, 17), (17, 18), (18, 19), (19, 20)]:
            ctx = Context(
                mask=causal() & padding(stop - pads),
                q_positions=positions[:, start:stop],
                kv_positions=positions[:, :stop],
                phase="decode" if start else "prefill",
            )
            parts.append(made(x[:, start:stop], cache=cache, ctx=ctx).y)
    alone, _ = decoded(made, x[1:, 5:], 12)
    torch.testing.assert_close(torch.cat(parts, 1)[1:, 5:], alone)


@EVERY
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_of_tensor_parallelism_add_up(key, ranks):
    made, x = layer(key, num_heads=16, head_dim=12, out_bias=True), tokens()
    whole = made(x, mask=causal()).y
    parts = [
        foveate.Attention(DIM, 16, made.projection.shard(rank, ranks)) for rank in range(ranks)
    ]
    torch.testing.assert_close(sum(p.eval()(x, mask=causal()).y for p in parts), whole)
    with pytest.raises(InputError, match="evenly"):
        made.projection.shard(0, 7)
    with pytest.raises(InputError, match="rank < ranks"):
        made.projection.shard(2, 2)


@EVERY
def test_gradients_reach_every_parameter(key):
    made, x = layer(key).train(), tokens().requires_grad_()
    out = made(x, mask=causal())
    losses = [value for name, value in out.aux.items() if name.endswith("_loss")]
    (out.y.square().sum() + sum(losses)).backward()
    assert x.grad.isfinite().all()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


@EVERY
def test_low_precision(key):
    made, x = layer(key), tokens()
    exact = made(x, mask=causal()).y
    low = made.to(torch.bfloat16)(x.bfloat16(), mask=causal()).y
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).abs().max() < 0.1 * exact.abs().max()


@EVERY
def test_reordering_the_cache_reorders_what_comes(key):
    made, x = layer(key), tokens(12)
    rows = torch.tensor([1, 1, 0])
    _, cache = decoded(made, x, 11)
    with torch.no_grad():
        cache.truncate(11)
        cache.reorder(rows)
        y = made(x[rows, 11:], mask=causal(), cache=cache).y
    torch.testing.assert_close(y, decoded(made, x, 11)[0][rows, 11:])


@EVERY
def test_every_projection_takes_a_sparse_attention(key):
    made, x = layer(key, attention="sink-window(sinks=2, window=8)"), tokens()
    seen = foveate.sinks(2) | foveate.window(7, 0)
    dense = layer(key)(x, mask=causal() & seen).y
    torch.testing.assert_close(made(x, mask=causal()).y, dense)


@EVERY
def test_no_position(key):
    """Without positions, tokens in front in another order change nothing."""
    made, x = layer(key, position="none"), tokens()
    order = torch.cat((torch.randperm(36), torch.tensor([36])))
    torch.testing.assert_close(made(x).y[:, -1], made(x[:, order]).y[:, -1])


# -- multi-head, grouped, multi-query --------------------------------------------------------------
@pytest.mark.parametrize(("key", "kv_heads"), [("mha", 4), ("gqa(kv_heads=2)", 2), ("mqa", 1)])
def test_grouped_heads_by_definition(key, kv_heads):
    made, x = layer(key, bias=True, out_bias=True), tokens()
    p = made.projection
    width = DIM // HEADS
    q, k, v = (f(x).unflatten(2, (-1, width)).transpose(1, 2) for f in (p.q, p.k, p.v))
    assert k.shape[1] == kv_heads
    o = softmax_attention(rotated(q), rotated(k), v, width**-0.5)
    expected = functional.linear(o.transpose(1, 2).flatten(2), p.out.weight, p.out.bias)
    torch.testing.assert_close(made(x, mask=causal()).y, expected)
    cache = decoded(made.float(), x.float(), 30)[1]
    assert cache.elements_per_token == 2 * kv_heads * width


def test_cross_attention():
    made = layer("gqa(kv_heads=2)", kv_dim=20, position="none")
    x, source = tokens(9), torch.randn(2, 31, 20, dtype=torch.float64)
    p = made.projection
    q, k, v = (
        f(y).unflatten(2, (-1, 12)).transpose(1, 2)
        for f, y in ((p.q, x), (p.k, source), (p.v, source))
    )
    o = softmax_attention(q, k, v, 12**-0.5, causal=False)
    torch.testing.assert_close(made(x, source).y, p.out(o.transpose(1, 2).flatten(2)))


def test_an_attention_with_a_scale_of_its_own():
    made, x = layer("mha"), tokens()
    ours = made(x, ctx=Context(mask=causal(), scale=0.1)).y
    assert not torch.allclose(ours, made(x, mask=causal()).y)


def test_dropout_only_in_training():
    made, x = layer("mha", dropout=0.5), tokens()
    assert torch.equal(made(x).y, made(x).y)
    made.train()
    assert not torch.equal(made(x).y, made(x).y)


def test_heads_of_another_width():
    made = layer("mha", head_dim=32)
    assert made.projection.q.weight.shape == (128, DIM)
    assert made(tokens()).y.shape == (2, 37, DIM)


# -- what makes no sense is refused ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"projection": "full"}, "an attention, no projection"),
        ({"projection": 3}, "a int, no projection"),
        ({"attention": "mqa"}, "a projection, no attention"),
        ({"position": "alibi"}, "known are none, rope"),
        ({"projection": "gqa(kv_heads=3)"}, "can't share 3"),
        ({"num_heads": 5}, "don't divide the width"),
        ({"projection": "gqa(kv_heads=0)"}, "at least 1"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": 5}, "even head_dim, or position='none'"),
        ({"theta": 0.0}, "theta=0.0.: expected more than 0"),
        ({"dropout": 1.0}, "dropout=1.0.: expected 0 up to"),
        ({"projection": "mfa(eps=-1.0)"}, r"MFA\(eps=-1.0\): expected a finite number"),
        ({"projection": "tpla(mscale=0)"}, r"TPLA\(mscale=0\): expected a finite number"),
    ],
)
def test_refusals(options, said):
    arguments = {"dim": DIM, "num_heads": HEADS} | options
    with pytest.raises(InputError, match=said):
        foveate.Attention(**arguments)


def test_unknown_projection_offers_the_nearest():
    with pytest.raises(UnknownMethodError, match="'mqa'"):
        foveate.Attention(DIM, HEADS, "mqaa")


def test_bad_inputs_are_named():
    made, x = layer("mha"), tokens()
    with pytest.raises(InputError, match=r"expected x \(B, L, 48\)"):
        made(x[..., :3])
    with pytest.raises(InputError, match="x_kv"):
        made(x, x[:1])
    with pytest.raises(InputError, match="not both"):
        made(x, mask=causal(), ctx=Context(mask=causal()))
    with pytest.raises(InputError, match=r"made by new_cache\(\), got a dict"):
        made(x, cache={})
    with pytest.raises(InputError, match="positions are for 37 queries and 3 keys"):
        made(x, ctx=Context(kv_positions=torch.arange(3), q_positions=torch.arange(37)))


# -- the cache -------------------------------------------------------------------------------------
def test_cache_grows_seldom_and_keeps_no_copies():
    made, x = layer("mqa", torch.float32), tokens(64, dtype=torch.float32)
    _, cache = decoded(made, x, 1, capacity=64)
    assert cache.allocated() == cache.bytes()
    buffer = cache._held["k"].data_ptr()
    cache.truncate(10)
    with torch.no_grad():
        made(x[:, 10:20], mask=causal(), cache=cache)
    assert cache._held["k"].data_ptr() == buffer


def test_evicted_tokens_are_not_seen():
    made, x = layer("mha", position="none"), tokens(12)
    _, cache = decoded(made, x[:, :11], 11)
    cache.evict(torch.tensor([3, 7]))
    keep = [i for i in range(12) if i not in (3, 7)]
    with torch.no_grad():
        y = made(x[:, 11:], mask=causal(), cache=cache).y
    torch.testing.assert_close(y, made(x[:, keep], mask=causal()).y[:, -1:])


def test_gradients_pass_through_a_cache():
    made, x = layer("mha"), tokens(12).requires_grad_()
    cache = made.new_cache()
    made(x[:, :8], mask=causal(), cache=cache, ctx=Context(phase="prefill"))
    y = made(x[:, 8:], mask=causal(), cache=cache).y
    whole = made(x, mask=causal()).y[:, 8:]
    ours, theirs = (torch.autograd.grad(z.square().sum(), x)[0] for z in (y, whole))
    torch.testing.assert_close(ours, theirs)


def test_a_cache_goes_from_inference_mode_to_no_grad():
    made, x = layer("mha", torch.float32), tokens(12, dtype=torch.float32)
    cache = made.new_cache()
    with torch.inference_mode():
        made(x[:, :8], mask=causal(), cache=cache)
    with torch.no_grad():
        y = made(x[:, 8:], mask=causal(), cache=cache).y
    torch.testing.assert_close(y, made(x, mask=causal()).y[:, 8:])


def test_what_a_cache_refuses():
    made = layer("mha", torch.float32)
    cache = made.new_cache()
    entry = torch.zeros(2, HEADS, 3, 12)
    with pytest.raises(InputError, match="keeps k, v, got k"):
        cache.append({"k": entry})
    with pytest.raises(InputError, match="v is"):
        cache.append({"k": entry, "v": entry[:, :2]})
    cache.append({"k": entry, "v": entry})
    with pytest.raises(InputError, match="holds 2 rows"):
        cache.append({"k": entry[:1], "v": entry[:1]})
    with pytest.raises(InputError, match="only 3 tokens"):
        cache.truncate(4)
    with pytest.raises(InputError, match="places 0 to 2"):
        cache.evict(torch.tensor([3]))
    with pytest.raises(InputError, match="different names"):
        type(cache)([cache.fields[0]] * 2)
    with pytest.raises(InputError, match="unit 'sequence'"):
        type(cache)([cache.fields[0]._replace(unit="sequence")])
    cache.reset()
    assert (len(cache), cache.bytes()) == (0, 0)


def test_bounded_and_growing_caches_declare_alike():
    bounded = SinkWindowCache(1, 4)
    entry = torch.zeros(2, HEADS, 3, 12)
    bounded.update(entry, entry)
    ours = layer("mha").projection.fields
    assert [f._replace(name="", limit=None) for f in bounded.fields] == [
        f._replace(name="") for f in ours
    ]


# -- rotary positions ------------------------------------------------------------------------------
def test_tables_of_positions_outlive_a_forward_and_grow():
    made = layer("mfa-kr", torch.float32)
    short, long = tokens(5, dtype=torch.float32), tokens(70, dtype=torch.float32)
    before = made(short, mask=causal()).y
    y = made(long, mask=causal()).y
    again = layer("mfa-kr", torch.float32)(long, mask=causal()).y
    assert torch.equal(y, again)
    assert torch.equal(made(short, mask=causal()).y, before)


def test_far_positions_are_turned_exactly():
    """At position 10**6 an angle in fp32 is off by a tenth of a radian."""
    made, x = layer("mha", torch.float32), tokens(6, dtype=torch.float32)
    far = torch.arange(6) + 10**6
    ctx = Context(mask=causal(), q_positions=far, kv_positions=far)
    torch.testing.assert_close(made(x, ctx=ctx).y, made(x, mask=causal()).y, atol=2e-5, rtol=0)
