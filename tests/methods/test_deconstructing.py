"""The variants of Deconstructing Attention, their configurations and their indicators."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

import foveate
from foveate import Context, attention, causal, documents, merge, padding, window
from foveate.methods import make
from foveate.methods.deconstructing import (
    RATIOS,
    VARIANTS,
    composed,
    indicators,
    standard_layers,
)
from foveate.methods.naming import make_attention
from foveate.ops.errors import InputError
from foveate.parts import StateCache

B, L, D, DV = 2, 37, 6, 5
FORMS = ("joint_full", "joint_diag", "printed")


def heads(length=L, q_heads=4, kv_heads=2, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    return (
        drawn(B, q_heads, length, D),
        drawn(B, kv_heads, length, D),
        drawn(B, kv_heads, length, DV),
    )


def ahead(**more):
    return Context(mask=causal(), **more)


def repeated(q, x):
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def taylor(q, k, v, form, allowed):
    """The quadratic form, by the spec's equations."""
    k, v = repeated(q, k), repeated(q, v)
    s = q @ k.mT / math.sqrt(D)
    squares = (q**2 / math.sqrt(2)) @ (k**2 / math.sqrt(2)).mT / D
    parts = {
        "joint_full": [1 + s + s**2 / 2],
        "joint_diag": [1 + s + squares],
        "printed": [torch.ones_like(s), s, squares],
    }[form]
    out = 0
    for weights in parts:
        weights = weights * allowed
        out = out + weights @ v / weights.sum(-1, keepdim=True)
    return out


def scalar(q, k, v, allowed):
    """One score for each key: s_j = SiLU(q_j) . k_j / sqrt(d), by a softmax over a full matrix."""
    k, v = repeated(q, k), repeated(q, v)
    s = (functional.silu(q) * k).sum(-1) / math.sqrt(D)
    scores = s[..., None, :].expand(*s.shape, s.shape[-1]).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1), scores.softmax(-1) @ v, scores.logsumexp(-1)


TRI = torch.ones(L, L, dtype=torch.bool).tril()


def stepped(method, q, k, v, cuts):
    cache = StateCache(method.new_state())
    outs = []
    at = 0
    for n in cuts:
        part = (x[:, :, at : at + n] for x in (q, k, v))
        outs.append(method(*part, ahead(cache=cache)))
        at += n
    return torch.cat([o.out for o in outs], 2), torch.cat([o.lse for o in outs], 2), cache


# -- oracle 1: Non-approximate ---------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_oracle_1_non_approximate_recurrent_is_quadratic(chunk):
    method = make(f"deconstructed-nonapproximate(chunk={chunk})")
    q, k, v = heads(scale=3.0)
    _, expected, lse = scalar(q, k, v, TRI)
    result = method(q, k, v, ahead())
    torch.testing.assert_close(result.out, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(result.lse, lse, atol=1e-10, rtol=1e-10)
    for cuts in ([1] * L, [20, 1, 16]):
        out, lse_, cache = stepped(method, q, k, v, cuts)
        torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(lse_, lse, atol=1e-10, rtol=1e-10)
    # N, D and m of each head: the spec's 2 B d + 4 B h bytes in half precision
    assert cache.bytes() == 8 * (B * 4 * DV + 2 * B * 4)


def test_oracle_1_constant_scores_are_the_running_mean():
    q, k, v = heads()
    out = make("deconstructed-nonapproximate")(torch.zeros_like(q), k, v, ahead()).out
    mean = v.cumsum(2) / torch.arange(1, L + 1)[:, None]
    torch.testing.assert_close(out, repeated(q, mean))


def test_oracle_1_rows_are_the_row_before_rescaled():
    q, k, _ = heads()
    v = torch.eye(L, dtype=torch.float64).expand(B, 2, L, L)
    a = make("deconstructed-nonapproximate")(q, k, v, ahead()).out  # the weights themselves
    torch.testing.assert_close(a, scalar(q, k, v, TRI)[0])
    for i in range(5, L - 1):
        torch.testing.assert_close(
            a[..., i + 1, 1:5] / a[..., i + 1, :1], a[..., i, 1:5] / a[..., i, :1]
        )


def test_scores_that_explode_stay_finite():
    q, k, v = heads(scale=60.0)
    q = q.float().requires_grad_()
    out = make("deconstructed-nonapproximate")(q, k.float(), v.float(), ahead()).out
    assert out.isfinite().all()
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.isfinite().all()
    expected = scalar(q.detach().double(), k, v, TRI)[1]
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)


def test_disjoint_keys_merge_by_the_lse():
    method, (q, k, v) = make("deconstructed-nonapproximate"), heads()
    whole = method(q, k, v, Context())
    parts = [method(*(x[:, :, s] for x in (q, k, v)), Context()) for s in (slice(20), slice(20, L))]
    firsts = [foveate.AttentionOutput(p.out[:, :, :1], p.lse[:, :, :1]) for p in parts]
    torch.testing.assert_close(merge(firsts).out, whole.out[:, :, :1])


def test_normalised_queries_and_keys():
    q, k, v = heads()
    out = make("deconstructed-nonapproximate(norm=True, silu=False)")(q, k, v, ahead()).out
    unit = [x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k)]
    s = (unit[0] * repeated(q, unit[1])).sum(-1) / math.sqrt(D)
    weights = s[..., None, :].expand(B, 4, L, L).masked_fill(~TRI, -torch.inf).softmax(-1)
    torch.testing.assert_close(out, weights @ repeated(q, v))


# -- oracle 2: Approximate -------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_oracle_2_approximate_recurrent_is_quadratic(form, chunk):
    method = make(f"deconstructed-approximate(form={form!r}, chunk={chunk})")
    q, k, v = heads(scale=0.4)
    if form != "joint_full":
        q, k = q.abs(), k.abs()  # so that no denominator comes near 0
    expected = taylor(q, k, v, form, TRI)
    result = method(q, k, v, ahead())
    torch.testing.assert_close(result.out, expected, atol=1e-10, rtol=1e-10)
    assert result.lse.isnan().all()
    for cuts in ([1] * L, [20, 1, 16]):
        out, _, cache = stepped(method, q, k, v, cuts)
        torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    features = 1 + D + D * (D + 1) // 2 if form == "joint_full" else 1 + 2 * D
    assert cache.bytes() == 8 * B * 2 * features * (DV + 1)


def test_oracle_2_every_weight_is_at_least_a_half():
    q, k, v = heads(scale=2.0)
    (weights,) = make("deconstructed-approximate").weights(q, repeated(q, k), D**-0.5)
    assert weights.min() >= 0.5
    assert weights.min() < 0.6
    eye = torch.eye(L, dtype=torch.float64).expand(B, 2, L, L)
    seen = make("deconstructed-approximate(chunk=8)")(q, k, eye, ahead()).out
    torch.testing.assert_close(seen, (weights * TRI) / (weights * TRI).sum(-1, keepdim=True))


def test_oracle_2_small_scores_are_softmax_attention():
    q, k, v = heads(scale=0.2)
    s = q @ repeated(q, k).mT / math.sqrt(D)
    q = q * (0.1 / s.abs().max())
    v = v.abs() + 1
    ours = make("deconstructed-approximate")(q, k, v, ahead()).out
    dense = attention(q, k, v, causal(), backend="reference").out
    assert ((ours - dense).abs() / dense.abs()).max() < 2e-4
    assert ((ours - dense).abs() / dense.abs()).max() > 1e-9


def test_the_printed_cache_is_the_papers():
    """In numbers: 3 vectors and 2 matrices for each head, and the count of the first term."""
    method = make("deconstructed-approximate(form='printed')")
    q, k, v = heads(kv_heads=4)
    v = torch.randn_like(k)
    _, _, cache = stepped(method, q, k, v, [L])
    assert cache.bytes() / 8 / B / 4 == 3 * D + 2 * D * D + 1


def test_denominators_near_zero_are_guarded():
    q, k, v = heads()
    q = q.requires_grad_()
    out = make("deconstructed-approximate(form='printed')")(q, k * 0, v, ahead()).out
    assert out.isfinite().all()
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.isfinite().all()


# -- what both share -------------------------------------------------------------------------------
BOTH = ("deconstructed-approximate", "deconstructed-nonapproximate")


@pytest.mark.parametrize("key", BOTH)
def test_backward_over_many_chunks(key):
    method = make(f"{key}(chunk=8)")
    q, k, v = (x.requires_grad_() for x in heads())
    out = method(q, k, v, ahead(phase="train")).out
    expected = taylor(q, k, v, "joint_full", TRI) if key == BOTH[0] else scalar(q, k, v, TRI)[1]
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("key", BOTH)
def test_bidirectional_sees_everything(key):
    q, k, v = heads()
    everything = torch.ones(L, L, dtype=torch.bool)
    expected = (
        taylor(q, k, v, "joint_full", everything)
        if key == BOTH[0]
        else scalar(q, k, v, everything)[1]
    )
    torch.testing.assert_close(make(f"{key}(chunk=8)")(q, k, v, Context()).out, expected)


@pytest.mark.parametrize("key", BOTH)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("both_ways", [False, True])
def test_padding_is_never_read(key, side, both_ways):
    method, (q, k, v) = make(f"{key}(chunk=8)"), heads()
    pads = torch.tensor([0, 9])
    mask = padding(L - pads) if both_ways else causal() & padding(L - pads)
    ctx = Context(mask=mask)
    real = slice(None, L - 9)
    if side == "left":
        at = torch.arange(L) - pads[:, None]
        ctx, real = Context(mask=mask, q_positions=at, kv_positions=at), slice(9, None)
    k = k.requires_grad_()
    out, lse = method(q, k, v, ctx)
    alone = method(*(x[1:, :, real] for x in (q, k, v)), Context() if both_ways else ahead())
    torch.testing.assert_close(out[1:, :, real], alone.out)
    whole = method(q[:1], k[:1], v[:1], Context() if both_ways else ahead())
    torch.testing.assert_close(out[:1], whole.out)
    assert out.isfinite().all()
    (grad,) = torch.autograd.grad(out[1:, :, real].sum() + out[:1].sum(), k)
    assert grad.isfinite().all()
    if key == BOTH[1] and side == "left" and not both_ways:
        assert (lse[1, :, :9] == -torch.inf).all()
        assert not out[1, :, :9].any()


@pytest.mark.parametrize("key", BOTH)
def test_no_tokens_give_no_output(key):
    given = [x[:, :, :0] for x in heads()]
    assert make(key)(*given, ahead()).out.shape == (B, 4, 0, DV)
    none = [x[:0] for x in heads()]
    assert make(key)(*none, ahead()).out.shape == (0, 4, L, DV)


@pytest.mark.parametrize("key", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(key, dtype):
    method, given = make(key), heads()
    low = [x.to(dtype) for x in given]
    result = method(*low, ahead())
    exact = method(*(x.double() for x in low), ahead()).out
    assert result.out.dtype == dtype
    band = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(result.out.double(), exact, atol=band, rtol=band)


@pytest.mark.parametrize("key", BOTH)
@pytest.mark.parametrize(
    ("ctx", "said"),
    [
        (Context(mask=causal() & window(4, 0)), "neither causal nor full"),
        (Context(mask=causal() & documents([0, 9, L])), "neither causal nor full"),
        (Context(mask=causal() & padding([L + 1, 3])), f"only {L} keys"),
        (Context(mask=documents([0, L - 1])), f"there are {L} keys"),
        (Context(mask=causal(), softcap=3.0), "softcap"),
        (Context(mask=causal(), dropout=0.1), "dropout"),
    ],
)
def test_what_is_refused(key, ctx, said):
    with pytest.raises(InputError, match=said):
        make(key)(*heads(), ctx)


@pytest.mark.parametrize("key", BOTH)
def test_other_lengths_and_bidirectional_states_are_refused(key):
    q, k, v = heads()
    with pytest.raises(InputError, match="same tokens"):
        make(key)(q[:, :, -1:], k, v, ahead())
    cache = StateCache(make(key).new_state())
    make(key)(q, k, v, ahead(cache=cache))
    with pytest.raises(InputError, match="causal"):
        make(key)(q, k, v, Context(cache=cache))
    for bad in ("(chunk=0)", "(form='x')", "(eps=0.0)"):
        with pytest.raises(InputError):
            make(key + bad)


@pytest.mark.parametrize("key", BOTH)
def test_a_trained_model_has_no_use_for_them(key):
    with pytest.raises(InputError, match="train one with it"):
        make_attention(f"{key}(chunk=16)")


def test_time_and_memory_are_linear():
    """Products of twice the tokens are twice as many: nothing L x L is formed."""
    from torch.utils.flop_counter import FlopCounterMode

    for key in BOTH:
        counts = []
        for length in (512, 1024):
            given = [x.float() for x in heads(length)]
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                make(key)(*given, ahead())
            counts.append(counter.get_total_flops())
        assert counts[1] == 2 * counts[0]


@pytest.mark.parametrize("key", BOTH)
def test_what_training_writes_is_linear(key):
    """Forward and backward: no gradient of a chunk is as long as the sequence."""
    from foveate.runs.work import Work

    written = []
    for length in (1024, 4096):
        given = [x.float().requires_grad_() for x in heads(length)]
        with Work() as work:
            make(key)(*given, ahead()).out.sum().backward()
        written.append(work.numbers)
    assert written[1] < 4.2 * written[0]


@pytest.mark.parametrize("key", BOTH)
@pytest.mark.parametrize("mask", [causal(), None])
def test_backward_keeps_no_features_of_tokens(key, mask):
    """What is held for the backward is about the inputs, not d^2 / 2 numbers for each token."""
    held = {}

    def keep(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    given = [torch.randn(1, n, 2048, 32, requires_grad=True) for n in (4, 2, 2)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        make(f"{key}(chunk=256)")(*given, Context(mask=mask, phase="train"))
    assert sum(held.values()) < 4 * sum(x.numel() * 4 for x in given)


# -- oracle 7: indicators --------------------------------------------------------------------------
def test_oracle_7_indicators_of_uniform_and_identity():
    uniform = (TRI / torch.arange(1, L + 1)[:, None]).double().expand(1, 3, L, L)
    got = indicators(uniform)
    rows = range(1, L + 1)
    assert got.entropy[0].tolist() == pytest.approx([sum(math.log(i) for i in rows) / L] * 3)
    assert got.sink[0].tolist() == pytest.approx([sum(1 / i for i in rows) / L] * 3)
    assert got.concentration[0, 0] == pytest.approx(math.sqrt(sum(1 / i for i in rows)))
    assert got.diversity.tolist() == [0]
    identity = indicators(torch.eye(L).expand(1, 2, L, L))
    assert identity.entropy.tolist() == [[0, 0]]
    assert identity.local[0, 0].tolist() == [1, 0, 0, 0]
    two = indicators(torch.stack((uniform[0, 0], torch.eye(L, dtype=torch.float64)))[None])
    by_hand = (uniform[0, 0] - torch.eye(L)).abs().sum() / 2 * 2 / (L * (L + 1))
    assert float(two.diversity) == pytest.approx(float(by_hand))
    with pytest.raises(InputError, match="later tokens"):
        indicators(torch.ones(1, 1, 3, 3))


# -- configurations --------------------------------------------------------------------------------
def test_the_ratios_are_the_papers_for_24_layers():
    every = range(1, 25)
    expected = {
        "uniform": [], "even": [i for i in every if not i % 2], "odd": [i for i in every if i % 2],
        "top": list(range(1, 13)), "middle": [*range(1, 7), *range(19, 25)],
        "bottom": list(range(13, 25)), "quarter": [4, 8, 12, 16, 20, 24], "first": [1],
        "last": [24], "bilateral": [1, 24],
    }  # fmt: skip
    assert {ratio: list(standard_layers(ratio, 24)) for ratio in RATIOS} == expected


def test_a_composition_is_two_lists_by_layer():
    got = composed("mlp", 4, "even")
    assert got == {
        "attention": ["full"] * 4,
        "mixer": ["deconstructed-mlp", None, "deconstructed-mlp", None],
    }
    got = composed("approximate", 2, options="form='printed'")
    assert got["attention"] == ["deconstructed-approximate(form='printed')"] * 2
    with pytest.raises(InputError, match="mlp"):
        composed("mpl", 2)
    with pytest.raises(InputError, match="even"):
        standard_layers("evn", 2)
    assert set(VARIANTS) >= {"standard", "rnd-emb-qk"}


@pytest.mark.parametrize("key", BOTH)
def test_autocast_does_not_narrow_the_sums(key):
    given, method = [x.float() for x in heads()], make(f"{key}(chunk=8)")
    plain = method(*given, ahead()).out
    with torch.autocast("cpu", torch.bfloat16):
        cast = method(*given, ahead()).out
    torch.testing.assert_close(cast, plain, atol=1e-6, rtol=1e-6)
