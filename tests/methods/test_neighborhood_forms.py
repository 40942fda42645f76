"""Fused, unfused and naive neighborhood attention, forward and backward, against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from foveate import Context, attention, causal, neighborhood
from foveate.methods import make
from foveate.methods.fna import FNA, naive, unfused
from foveate.methods.gna import GNA
from foveate.ops.errors import InputError

SETTINGS = [
    ((37,), (9,), (2,), (3,), (False,)),
    ((53,), (11,), (1,), (1,), (True,)),
    ((13, 10), (5, 4), (2, 1), (1, 2), (False, False)),
    ((9, 21), (9, 6), (3, 6), (1, 3), (True, False)),
    ((5, 7, 9), (3, 4, 5), (1, 2, 1), (1, 1, 1), (True, False, False)),
    ((6, 5, 4), (2, 5, 2), (2, 1, 1), (2, 1, 2), (False, False, True)),
]


def tensors(n, heads=2, kv_heads=2, dim=8, dtype=torch.float64):
    shapes = (2, heads, n, dim), (2, kv_heads, n, dim), (2, kv_heads, n, dim + 4)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def gnas(setting, **more):
    shape, window, stride, dilation, flags = setting
    return GNA(window=window, stride=stride, dilation=dilation, causal=flags, shape=shape, **more)


def gradients(result, inputs):
    weight = torch.linspace(-1, 1, result.out.numel(), dtype=result.out.dtype)
    loss = (result.out.flatten() * weight).sum() + result.lse.sum()
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_all_forms_and_their_gradients_are_the_references(setting, kv_heads):
    mask = neighborhood(*setting)
    inputs = tensors(mask.tokens, kv_heads=kv_heads)
    want = attention(*inputs, mask, backend="reference")
    wanted = gradients(want, inputs)
    for form in (lambda q, k, v: gnas(setting)(q, k, v), lambda q, k, v: unfused(q, k, v, mask)):
        got = form(*inputs)
        torch.testing.assert_close(got.out, want.out, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(got.lse, want.lse, atol=1e-12, rtol=1e-12)
        for one, two in zip(gradients(got, inputs), wanted):
            torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)
    if kv_heads == 2:
        got = naive(*inputs, mask)
        torch.testing.assert_close(got.out, want.out, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(got.lse, want.lse, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_fp32(setting):
    mask = neighborhood(*setting)
    inputs = tensors(mask.tokens, dtype=torch.float32)
    want = attention(*(x.double() for x in inputs), mask, backend="reference").out
    for got in (gnas(setting)(*inputs), unfused(*inputs, mask), naive(*inputs, mask)):
        torch.testing.assert_close(got.out.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["fused", "unfused"])
def test_gradcheck(form):
    mask = neighborhood((3, 4), (2, 3))
    inputs = tuple(x[:1, :1, :, :2].detach().requires_grad_() for x in tensors(12))
    call = gnas(((3, 4), (2, 3), 1, 1, False), q_tile=(2, 4), kv_tile=(2, 4))
    run = call if form == "fused" else lambda q, k, v: unfused(q, k, v, mask)
    assert gradcheck(lambda *x: tuple(run(*x)), inputs)


def test_dilated_is_undilated_on_every_residue():
    shape, d = (11, 13), (2, 3)
    q, k, v = tensors(143)
    whole = GNA(window=(3, 4), stride=(1, 2), dilation=d, shape=shape)(q, k, v).out
    whole = whole.unflatten(2, shape)
    for a, b in itertools.product(range(d[0]), range(d[1])):
        parts = [x.unflatten(2, shape)[:, :, a :: d[0], b :: d[1]] for x in (q, k, v)]
        inner = tuple(parts[0].shape[2:4])
        one = GNA(window=(3, 4), stride=(1, 2), shape=inner)(*(x.flatten(2, 3) for x in parts)).out
        mine = whole[:, :, a :: d[0], b :: d[1]].flatten(2, 3)
        torch.testing.assert_close(mine, one, atol=1e-13, rtol=1e-13)


def test_the_whole_axis_is_dense_attention():
    q, k, v = tensors(30)
    dense = attention(q, k, v)
    for method in (FNA(window=(5, 6), shape=(5, 6)), FNA(window=40)):
        got = method(q, k, v)
        assert torch.equal(got.out, dense.out)
        assert torch.equal(got.lse, dense.lse)
    past = attention(q, k, v, causal())
    for got in (
        FNA(window=30)(q, k, v, Context(mask=causal())),
        FNA(window=30, causal=True)(q, k, v),
    ):
        torch.testing.assert_close(got.out, past.out)


def test_constant_and_one_hot_values():
    mask = neighborhood((4, 5), (3, 3))
    q, k, _ = tensors(20)
    ones = torch.ones_like(k)
    hot = torch.eye(20, dtype=q.dtype).expand(2, 2, 20, 20)
    seen = mask.dense(20, 20)
    for form in (gnas(((4, 5), 3, 1, 1, False)), lambda q, k, v: unfused(q, k, v, mask)):
        torch.testing.assert_close(form(q, k, ones).out, ones)
        assert torch.equal(form(q, k, hot).out > 0, seen.expand(2, 2, 20, 20))


@pytest.mark.parametrize(
    ("shape", "window", "dilation"), [((12,), (5,), 1), ((7, 8), (3, 5), 1), ((7, 8), (3, 3), 2)]
)
def test_relative_position_bias(shape, window, dilation):
    mask = neighborhood(shape, window, dilation=dilation)
    inputs = tensors(mask.tokens)
    rpb = torch.randn(2, *(2 * k - 1 for k in window), dtype=torch.float64, requires_grad=True)
    got = unfused(*inputs, mask, rpb=rpb)
    place = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij")).flatten(1)
    away = (place[:, None, :] - place[:, :, None]) // dilation  # (axes, query, key)
    seen = mask.dense(mask.tokens, mask.tokens)[0, 0]
    away = torch.stack([(a + k - 1).clamp(0, 2 * k - 2) for a, k in zip(away, window)])
    bias = rpb[(slice(None), *away)]
    want = attention(*inputs, seen, bias=bias[None], backend="reference")
    torch.testing.assert_close(got.out, want.out, atol=1e-12, rtol=1e-12)
    for one, two in zip(gradients(got, (*inputs, rpb)), gradients(want, (*inputs, rpb))):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)


def test_the_bias_is_that_of_the_papers_start_formula():
    """start(i) = r + (r - i if i < r) + (L - 1 - r - i if i + r >= L), odd windows."""
    length, k = 11, 5
    r = k // 2
    mask, table = neighborhood(length, k), torch.arange(2.0 * k - 1).double()
    zero = torch.zeros(1, 1, length, 2, dtype=torch.float64)
    for i in range(length):
        start = r + (r - i if i < r else 0) + (length - 1 - r - i if i + r >= length else 0)
        lse = unfused(zero, zero, zero, mask, rpb=table[None]).lse[0, 0, i]
        torch.testing.assert_close(lse, table[start : start + k].logsumexp(0))


def test_a_class_token_and_text_see_and_are_seen_by_all():
    q, k, v = tensors(63 + 4)
    method = FNA(window=3, shape=(7, 9), before=1, after=3)
    allowed = torch.ones(67, 67, dtype=torch.bool)
    allowed[1:64, 1:64] = neighborhood((7, 9), 3).dense(63, 63)[0, 0]
    want = attention(q, k, v, allowed, backend="reference")
    got = method(q, k, v)
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.lse, want.lse)
    assert torch.equal(method.layout(q, k, v, Context()).dense()[0, 0], allowed)


def test_tokens_in_tile_order_need_no_moving():
    method = GNA(window=(6, 6), stride=(1, 2), q_tile=(4, 4), kv_tile=(4, 4))
    mask = method.on((8, 12))
    order = method.tiles(mask).q_slots
    q, k, v = tensors(96)
    mixed = Context(grid=(8, 12), q_positions=order, kv_positions=order)
    moved = [x[:, :, order] for x in (q, k, v)]
    layout = method.layout(*moved, mixed)
    assert layout.q_index is None
    assert layout.kv_index is None
    plain = method(q, k, v, Context(grid=(8, 12)))
    torch.testing.assert_close(method(*moved, mixed).out, plain.out[:, :, order])


@pytest.mark.parametrize("form", ["fused", "unfused"])
def test_what_inference_built_serves_training(form):
    mask = neighborhood((9, 14), (3, 5))  # of no other test: its tiles are kept
    inputs = tensors(mask.tokens)
    call = GNA((3, 5), shape=(9, 14)) if form == "fused" else lambda *x: unfused(*x, mask)
    with torch.inference_mode():
        first = call(*inputs)
        where = GNA((3, 5), shape=(9, 14)).tiles(mask).where
    assert not where.is_inference()
    got = call(*inputs)
    torch.testing.assert_close(got.out, first.out.clone())
    assert all(x.abs().sum() > 0 for x in gradients(got, inputs))


@pytest.mark.parametrize(("window", "dilation"), [(7, 1), (7, 2), (3, 4), (2, 30)])
@pytest.mark.parametrize("flag", [None, True])
def test_what_a_causal_sequence_sees_does_not_depend_on_its_length(window, dilation, flag):
    n = 24
    q, k, v = tensors(n)
    method = FNA(window=window, dilation=dilation, causal=flag)
    ctx = Context(mask=None if flag else causal())
    back = torch.arange(n)[:, None] - torch.arange(n)
    seen = (back >= 0) & (back % dilation == 0) & (back < window * dilation)
    want = attention(q, k, v, seen, backend="reference").out
    for length in range(1, n + 1):
        few = [x[:, :, :length] for x in (q, k, v)]
        torch.testing.assert_close(method(*few, ctx).out, want[:, :, :length])
        last = method(few[0][:, :, -1:], *few[1:], ctx).out
        torch.testing.assert_close(last, want[:, :, length - 1 : length])


def test_the_grid_comes_from_the_field_or_the_context():
    q, k, v = tensors(24)
    one = FNA(window=3, shape=(4, 6))(q, k, v)
    two = FNA(window=3)(q, k, v, Context(grid=(4, 6)))
    torch.testing.assert_close(one.out, two.out)
    with pytest.raises(InputError, match="4 x 5 tokens doesn't make 24 keys"):
        FNA(window=3)(q, k, v, Context(grid=(4, 5)))
    with pytest.raises(InputError, match="axis 1 has 6 tokens"):
        FNA(window=(3, 7), shape=(4, 6))


def test_the_texts_of_the_catalog():
    assert make("gna(window=(18, 24, 24), stride=[16, 8, 8])").stride == (16, 8, 8)
    assert make("fna").window == 7


def test_unfused_refuses_what_it_can_not_do():
    q, k, v = tensors(12)
    with pytest.raises(InputError, match="11 tokens, but there are 12 queries and 12 keys"):
        unfused(q, k, v, neighborhood(11, 3))
    with pytest.raises(InputError, match="expected shape"):
        unfused(q, k, v, neighborhood(12, 3), rpb=torch.zeros(2, 4))
    with pytest.raises(InputError, match="causal"):
        unfused(q, k, v, neighborhood(12, 3, causal=True), rpb=torch.zeros(2, 5))


@pytest.mark.parametrize("form", [naive, unfused])
def test_unfused_and_naive_refuse_tensors_that_do_not_fit(form):
    q = torch.randn(1, 4, 12, 8)
    mask = neighborhood(12, 3)
    k = q[:, :2] if form is unfused else q
    for bad, says in (
        ((q, k.expand(2, -1, -1, -1), k), "batch"),
        ((q, k, k[:, :, :11]), "tokens of k"),
        ((q, k, k[:, :1]), "heads"),
        ((q, k[..., :7], k), "8 numbers in a head and k 7"),
        ((q, q[:, :3], q[:, :3]), "4 heads aren't a multiple of 3"),
        ((q, k.double(), k), "one dtype"),
        ((q[0], k[0], k[0]), "4 axes"),
        ((q[:, :, :10], k[:, :, :10], k[:, :, :10]), "12 tokens, but there are 10 queries"),
    ):
        with pytest.raises(InputError, match=says):
            form(*bad, mask)
    if form is naive:
        with pytest.raises(InputError, match="as many heads"):
            naive(q, q[:, :2], q[:, :2], mask)
    none = form(q[:0], k[:0], k[:0], mask)
    assert none.out.shape == (0, 4, 12, 8)
    assert none.lse.shape == (0, 4, 12)
