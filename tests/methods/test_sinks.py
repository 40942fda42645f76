"""Attentions that need no sink, and redistribution: the oracles of the spec attention-sink."""

from __future__ import annotations

import math

import pytest
import torch

from foveate import Context, attention, blocks, causal, padding
from foveate.methods import make
from foveate.methods.sinks import weights
from foveate.ops import alibi, alibi_slopes, probs
from foveate.ops.errors import InputError
from foveate.ops.weighted import weighted

KINDS = (
    "clipped-softmax", "clipped-softmax(alpha=3.0)", "softpick", "sigmoid-attention",
    "sigmoid-attention(bias=0.0, normalise=True)", "elu-attention", "elu-attention(kernel=True)",
    "entmax", "entmax(alpha=2.0)",
)  # fmt: skip


def qkv(q_len=70, kv_len=70, dtype=torch.float64, batch=2):
    shapes = (batch, 4, q_len, 16), (batch, 2, kv_len, 16), (batch, 2, kv_len, 24)
    return tuple(2 * torch.randn(s, dtype=dtype) for s in shapes)


def row_of(kind: str, s: torch.Tensor) -> torch.Tensor:
    """The weights of one row's visible scores (n,), by the papers' formulas, one row at a time."""
    n = len(s)
    if kind.startswith("clipped"):
        gamma = -3.0 / n if "alpha" in kind else -0.1
        return ((1.1 - gamma) * s.softmax(0) + gamma).clamp(0, 1)
    if kind == "softpick":
        up = torch.expm1(s)
        return up.relu() / (up.abs().sum() + 1e-6)
    if kind == "sigmoid-attention":
        return torch.sigmoid(s - math.log(n))
    if kind.startswith("sigmoid"):
        return torch.sigmoid(s) / (torch.sigmoid(s).sum() + 1e-8)
    if kind == "elu-attention":
        return torch.where(s > 0, s + 1, s.exp())
    if kind.startswith("elu"):
        return s
    alpha = 2.0 if "2.0" in kind else 1.5
    low, high = s.max() * (alpha - 1) - 1, s.max() * (alpha - 1)  # bisection for the threshold
    for _ in range(200):
        tau = (low + high) / 2
        total = ((s * (alpha - 1) - tau).clamp_min(0) ** (1 / (alpha - 1))).sum()
        low, high = (tau, high) if total > 1 else (low, tau)
    return (s * (alpha - 1) - tau).clamp_min(0) ** (1 / (alpha - 1))


def by_definition(kind, q, k, v, table):
    """Row by row in loops; table (B, H, Lq, Lkv) bool."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if "kernel" in kind:
        q, k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    scores = q @ k.mT / 4.0
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    table = table.expand(*scores.shape)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        seen = table[b, h, i]
        if seen.any():
            out[b, h, i] = row_of(kind, scores[b, h, i, seen]) @ v[b, h, seen]
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_papers_row_by_row(kind):
    q, k, v = qkv(20, 23, batch=1)
    ours = make(kind)(q, k, v, Context(mask=causal()))
    theirs = by_definition(kind, q, k, v, causal().dense(20, 23))
    torch.testing.assert_close(ours.out, theirs, atol=1e-12, rtol=1e-12)
    assert ours.lse.isnan().all()  # so that a merge by it shows


def test_oracle_6_worked_examples():
    s, seen = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    picked = weights.softpick(s, seen, 1e-9)
    expected = torch.tensor([0.7311, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(picked, expected, atol=5e-5, rtol=0)
    # large scores, where e^s has no place: the form with the row's maximum
    large = weights.softpick(torch.tensor([900.0, 900.0, -900.0]), seen, 1e-6)
    torch.testing.assert_close(large, torch.tensor([0.5, 0.5, 0.0]))
    # only small scores: all weights are 0, and no infinity comes up
    assert torch.equal(weights.softpick(torch.full((3,), -900.0), seen, 1e-6), torch.zeros(3))


@pytest.mark.parametrize("mask", [causal(), None], ids=repr)
def test_oracle_6_unclipped_is_softmax(mask):
    q, k, v = qkv()
    ours = make("clipped-softmax(zeta=1.0, gamma=0.0)")(q, k, v, Context(mask=mask))
    dense = attention(q, k, v, mask, backend="reference")
    torch.testing.assert_close(ours.out, dense.out, atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_formula(kind):
    shape = (1, 2, 9, 4), (1, 1, 11, 4), (1, 1, 11, 3), (1, 1, 9, 11)
    given = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shape)
    weigh = make(kind).weigh

    def run(q, k, v, bias):
        return weighted(q, k, v, weigh, causal(), softcap=3.0, bias=bias)

    assert torch.autograd.gradcheck(run, given, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_over_a_pattern_with_padding_and_in_pieces(kind):
    """Only the pattern's pairs count; a decoded token gets what it gets in the whole sequence."""
    inside = "pattern='sink-window(sinks=2, window=9)'"
    name, _, rest = kind.partition("(")
    method = make(f"{name}({inside}{', ' + rest.removesuffix(')') if rest else ''})")
    q, k, v = qkv(140, 140)
    lengths = torch.tensor([140, 101])
    table = make("sink-window(sinks=2, window=9)").layout(q, k, v, Context(mask=causal())).dense()
    table = table & padding(lengths).dense(140, 140)
    out = method(q, k, v, Context(mask=causal() & padding(lengths))).out
    rows = [0, 1, 63, 64, 100]
    expected = by_definition(kind, q[:, :, rows], k, v, table[:, :, rows])
    torch.testing.assert_close(out[:, :, rows], expected, atol=1e-11, rtol=1e-11)
    last = method(q[:1, :, -1:], k[:1], v[:1], Context(mask=causal(), phase="decode")).out
    torch.testing.assert_close(last, out[:1, :, -1:], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision(kind):
    q, k, v = qkv(dtype=torch.bfloat16)
    ours = make(kind)(q, k, v, Context(mask=causal())).out
    exact = make(kind)(q.double(), k.double(), v.double(), Context(mask=causal())).out
    assert ours.dtype == torch.bfloat16
    band = 2**-7 * float(exact.abs().max())
    torch.testing.assert_close(ours.double(), exact, atol=band, rtol=0)


def test_a_relative_bias_counts():
    q, k, v = qkv(40, 40)
    slopes = alibi_slopes(4).to(q.dtype)
    far = torch.arange(40)[:, None] - torch.arange(40)
    ours, theirs = (
        make("softpick")(q, k, v, Context(mask=causal(), bias=bias)).out
        for bias in (alibi(slopes, 39), (-slopes[:, None, None] * far)[None])
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clipped-softmax(zeta=0.9)", "zeta"),
        ("clipped-softmax(gamma=0.1)", "gamma"),
        ("softpick(eps=0.0)", "eps"),
        ("softpick(pattern='snapkv')", "pattern"),
        ("softpick(pattern='act')", "pattern"),
        ("entmax(alpha=3.0)", "1.5"),
        ("act(beta=1.5)", "beta"),
        ("act(a=0.0)", "above 0"),
    ],
)
def test_bad_hyper_parameters_are_refused(text, words):
    with pytest.raises(InputError, match=words):
        make(text)


def test_what_has_no_meaning_is_refused():
    q, k, v = qkv(8, 8)
    for ctx in (Context(sink_logits=torch.zeros(4)), Context(dropout=0.1)):
        with pytest.raises(InputError, match="softpick|Softpick"):
            make("softpick")(q, k, v, ctx)
    q, k, v = qkv(40, 40)
    with pytest.raises(InputError, match="order of its own"):
        make("softpick(pattern='moba(block=4, topk=2)')")(q, k, v, Context(mask=causal()))


# -- oracle 7: redistribution --------------------------------------------------------------------
def peaked(q_len=90, dtype=torch.float64):
    """Queries and keys that put much on the keys 0, 7 and 40."""
    q, k, v = (x / 2 for x in qkv(q_len, q_len, dtype))
    q[..., 0] = 4.0
    k[..., 0] = 0.0
    k[:, 0, [0, 7, 40], 0] = torch.tensor([5.0, 4.0, 4.5], dtype=dtype)
    k[:, 1, [0, 7], 0] = torch.tensor([5.0, 4.0], dtype=dtype)
    return q, k, v


def moved(method, q, k, lse, mask):
    """A' by its definition, from whole weight matrices."""
    a = probs(q, k, lse, mask=mask)
    table = mask.dense(q.shape[2], k.shape[2]).expand_as(a)
    mean = a.sum(2) / table.sum(2).clamp_min(1)
    chosen = mean > method.a / k.shape[2]
    chosen[..., : method.first] = False
    s = chosen[:, :, None].expand_as(a)
    m, n = (a * s).sum(-1, keepdim=True), (a * ~s).sum(-1, keepdim=True)
    return torch.where(s, method.beta * a, a * (n + (1 - method.beta) * m) / n), chosen, a


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_oracle_7_redistribution_is_its_definition_keeps_row_sums_and_ratios(beta):
    q, k, v = peaked()
    method = make(f"act(a=5.0, beta={beta})")
    dense = attention(q, k, v, causal())
    after, chosen, before = moved(method, q, k, dense.lse, causal())
    assert chosen[:, :2, 7].all()
    assert chosen[:, :2, 40].all()
    assert not chosen[..., 0].any()
    torch.testing.assert_close(after.sum(-1), torch.ones_like(after[..., 0]))
    ratio = (after / before)[0, 0, 89, ~chosen[0, 0]]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    ours = method(q, k, v, Context(mask=causal()))
    theirs = after @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(ours.out, theirs, atol=1e-12, rtol=1e-12)
    if beta == 1.0:
        torch.testing.assert_close(ours.out, dense.out)


def test_redistribution_with_padding_sink_logits_and_gradients():
    q, k, v = (x.requires_grad_() for x in peaked(60))
    b = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([60, 44])
    mask = causal() & padding(lengths)
    method = make("act")
    out = method(q, k, v, Context(mask=mask, sink_logits=b)).out
    alone = method(
        q[1:, :, :44], k[1:, :, :44], v[1:, :, :44], Context(mask=causal(), sink_logits=b)
    ).out
    torch.testing.assert_close(out[1:, :, :44], alone)
    # rows now sum to less than 1, to the same as before; and gradients are the formula's
    lse = attention(q[:1], k[:1], v[:1], causal(), sink_logits=b).lse
    after, _, before = moved(method, q[:1], k[:1], lse, causal())
    torch.testing.assert_close(after.sum(-1), before.sum(-1))
    theirs = after @ v[:1].repeat_interleave(2, 1)
    torch.testing.assert_close(out[:1], theirs, atol=1e-12, rtol=1e-12)
    weight = torch.randn_like(theirs)
    given = (q, k, v, b)
    one = torch.autograd.grad((out[:1] * weight).sum(), given, retain_graph=True)
    two = torch.autograd.grad((theirs * weight).sum(), given)
    for ours, other in zip(one, two):
        torch.testing.assert_close(ours, other, atol=1e-10, rtol=1e-10)


def test_redistribution_under_positions_of_left_padding():
    q, k, v = peaked(50)
    pads = torch.tensor([0, 9])
    at = torch.arange(50)[None] - pads[:, None]
    ctx = Context(mask=causal() & padding(50 - pads), q_positions=at, kv_positions=at)
    out = make("act")(q, k, v, ctx).out
    alone = make("act")(q[1:, :, 9:], k[1:, :, 9:], v[1:, :, 9:], Context(mask=causal())).out
    torch.testing.assert_close(out[1:, :, 9:], alone)
    assert out[0].isfinite().all()


@pytest.mark.parametrize("q_len", [50, 17])
def test_redistribution_under_a_relative_bias(q_len):
    """A bias by distance counts from where the chosen keys stand, not from their place in S."""
    q, k, v = peaked(50)
    q, slopes = q[:, :, -q_len:], alibi_slopes(4).to(q.dtype) / 8
    far = torch.arange(50 - q_len, 50)[:, None] - torch.arange(50)
    plain = (-slopes[:, None, None] * far)[None].requires_grad_()
    slopes.requires_grad_()
    one, two = (
        make("act(a=3.0)")(q, k, v, Context(mask=causal(), bias=bias)).out
        for bias in (alibi(slopes, 49), plain)
    )
    torch.testing.assert_close(one, two)
    assert not torch.allclose(two, attention(q, k, v, causal(), bias=plain).out)
    weight = torch.randn_like(one)
    (ours,) = torch.autograd.grad((one * weight).sum(), slopes)
    (table,) = torch.autograd.grad((two * weight).sum(), plain)
    torch.testing.assert_close(ours, -(table * far).sum((0, 2, 3)))


def test_redistribution_where_a_row_sees_sinks_only():
    q = torch.ones(1, 1, 1, 4, dtype=torch.float64)
    k, v = torch.randn(2, 1, 1, 3, 4, dtype=torch.float64).unbind(0)
    table = torch.tensor([[[[False, True, True]]]])
    ctx = Context(mask=blocks(table, 1))
    out = make("act(a=0.001, beta=0.0)")(q, k, v, ctx).out
    torch.testing.assert_close(out, attention(q, k, v, blocks(table, 1)).out)
