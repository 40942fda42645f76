"""Tensor attention: the oracles of its spec, on given queries, keys and values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foveate import Context, attention, blocks, causal, documents, padding, window
from foveate.methods.tensor_attention import (
    Form,
    bound,
    causal_scan,
    degree_for,
    full,
    key_features,
    polynomial,
    query_features,
    rank,
    tensor_attention,
)
from foveate.methods.tensor_attention import exact as engine
from foveate.methods.tensor_attention import features as feature_file
from foveate.methods.tensor_attention import method as method_file
from foveate.ops.errors import InputError

TIGHT = {"atol": 1e-12, "rtol": 1e-12}
EXACT = Form("exact")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks and chunks that don't fit the lengths, so that there are several."""
    monkeypatch.setattr(engine, "_LEAST", 4)
    monkeypatch.setattr(engine, "_QUERIES", 8)
    monkeypatch.setattr(feature_file, "_BUDGET", 2000)


def drawn(n=13, d=3, dv=5, heads=4, kv=2, batch=2, order=3):
    more = {"dtype": torch.float64}
    q = torch.randn(batch, heads, n, d, **more)
    keys = [torch.randn(batch, kv, n, d, **more) for _ in range(order - 1)]
    values = [torch.randn(batch, kv, n, dv, **more) for _ in range(order - 1)]
    return q, keys, values


def logits(q: Tensor, keys) -> Tensor:
    """(B, Hq, n, n ... n): the trilinear (or larger) product by einsum."""
    group, names = q.shape[1] // keys[0].shape[1], "abc"[: len(keys)]
    given = ",".join(f"zh{c}d" for c in names)
    each = (k.repeat_interleave(group, 1) for k in keys)
    return torch.einsum(f"zhid,{given}->zhi{names}", q, *each)


def by_definition(q, keys, values, mask=None, scale=None, weigh=torch.exp):
    """out and lse from the whole table of tuples."""
    n, m = q.shape[2], len(keys)
    scores = logits(q, keys) * (1 / q.shape[3] if scale is None else scale)
    weights = weigh(scores)
    if mask is not None:
        seen = mask.dense(n, n)
        for s in range(m):
            at = [1] * m
            at[s] = n
            weights = weights * seen.view(*seen.shape[:2], n, *at)
    group, names = q.shape[1] // keys[0].shape[1], "abc"[:m]
    given = ",".join(f"zh{c}e" for c in names)
    each = (v.repeat_interleave(group, 1) for v in values)
    total = weights.flatten(3).sum(-1)
    out = torch.einsum(f"zhi{names},{given}->zhie", weights, *each)
    return out / total.masked_fill(total == 0, 1.0)[..., None], total.log()


# -- the spec's oracles ---------------------------------------------------------------------------
@pytest.mark.parametrize("mask", [None, causal()])
@pytest.mark.parametrize(("order", "n"), [(2, 13), (3, 13), (4, 7)])
def test_oracle_1_streaming_equals_einsum(order, n, mask):
    q, keys, values = drawn(n, order=order)
    found = tensor_attention(q, keys, values, mask, form=EXACT)
    out, lse = by_definition(q, keys, values, mask)
    torch.testing.assert_close(found.out, out, **TIGHT)
    torch.testing.assert_close(found.lse, lse, **TIGHT)


def test_oracle_1_streaming_equals_explicit_kronecker_matrices():
    q, keys, values = drawn(heads=1, kv=1, batch=1)
    k, v = (
        torch.stack([a[j] * b[l] for j in range(13) for l in range(13)])
        for a, b in ((keys[0][0, 0], keys[1][0, 0]), (values[0][0, 0], values[1][0, 0]))
    )
    a = (q[0, 0] @ k.mT / 3).exp()
    found = tensor_attention(q, keys, values, form=EXACT)
    torch.testing.assert_close(found.out[0, 0], a @ v / a.sum(1, keepdim=True), **TIGHT)


def test_oracle_2_a_second_key_of_ones_is_softmax_attention():
    q, (k, _), (v, _) = drawn()
    expected = attention(q, k, v, scale=1 / 3, backend="reference").out
    ones = torch.ones_like(k), torch.ones_like(v)
    found = tensor_attention(q, (k, ones[0]), (v, ones[1]), form=EXACT)
    torch.testing.assert_close(found.out, expected, **TIGHT)
    alone = tensor_attention(q, [k], [v], form=EXACT)  # a single second key of ones is none
    torch.testing.assert_close(alone.out, expected, **TIGHT)
    torch.testing.assert_close(found.lse - alone.lse, torch.full_like(alone.lse, math.log(13)))


@pytest.mark.parametrize("form", [EXACT, Form("features", degree=4, tolerance=math.inf)])
@pytest.mark.parametrize("mask", [None, causal()])
def test_oracle_3_swapping_the_factors_changes_nothing(form, mask):
    q, keys, values = drawn()
    one = tensor_attention(q, keys, values, mask, form=form)
    two = tensor_attention(q, keys[::-1], values[::-1], mask, form=form)
    torch.testing.assert_close(one.out, two.out, **TIGHT)
    torch.testing.assert_close(one.lse, two.lse, **TIGHT)


@pytest.mark.parametrize("kind", ["taylor", "chebyshev"])
@pytest.mark.parametrize("order", [3, 4])
def test_oracle_4_features_are_the_polynomial_of_the_logits(kind, order):
    q, keys, values = drawn(7, d=4, kv=4, order=order)
    scale = 0.3
    p = polynomial(kind, 4, 2.0)
    u1 = query_features(q, p, scale)
    others = [key_features(k, 4) for k in keys]
    assert u1.shape[-1] == rank(4, 4) == 70
    want = p(logits(q, keys) * scale)
    torch.testing.assert_close(logits(u1, others), want, atol=1e-10, rtol=1e-10)
    pairs = torch.stack([u.mT @ v for u, v in zip(others, values)])
    given = ",".join(f"zh{c}e" for c in "abc"[: order - 1])
    numerator = torch.einsum(f"zhi{'abc'[: order - 1]},{given}->zhie", want, *values)
    torch.testing.assert_close(u1 @ pairs.prod(0), numerator, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("mask", [None, causal(), padding([13, 8]), causal() & padding([13, 8])])
@pytest.mark.parametrize("order", [3, 4])
def test_oracle_4_features_are_masked_polynomial_attention(mask, order):
    q, keys, values = drawn(order=order)
    form = Form("features", degree=4, tolerance=math.inf)
    found = tensor_attention(q, keys, values, mask, form=form)
    out, lse = by_definition(q, keys, values, mask, weigh=polynomial("taylor", 4, 1.0))
    torch.testing.assert_close(found.out, out, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.lse, lse, atol=1e-10, rtol=1e-10)


ERRORS = {
    0.5: {2: 1e-7, 4: 2e-11},
    1.0: {2: 2e-5, 4: 2e-7, 6: 7e-10},
    1.5: {4: 7e-5, 8: 7e-8},
}


def uniform(size: float, order: int = 3, n: int = 40, d: int = 4):
    made = [(torch.rand(1, 1, n, d, dtype=torch.float64) * 2 - 1) for _ in range(2 * order - 1)]
    return made[0] * size, [k * size for k in made[1:order]], made[order:]


def errors(size: float, degrees, order: int = 3, seed: int = 0) -> dict[int, float]:
    """Largest error of an output for each degree."""
    torch.manual_seed(seed)
    q, keys, values = uniform(size, order)
    right = tensor_attention(q, keys, values, form=EXACT).out
    made = {}
    for g in degrees:
        p = polynomial("taylor", g, 1.0)
        made[g] = float((full(q, keys, values, p, 1 / 4).out - right).abs().max())
    return made


@pytest.mark.parametrize("size", sorted(ERRORS))
def test_oracle_5_errors_of_the_approximation(size):
    found = errors(size, ERRORS[size])
    for g, told in ERRORS[size].items():
        assert found[g] <= 10 * told


@pytest.mark.parametrize("size", [0.5, 1.0])
def test_oracle_5_errors_fall_by_ten_for_two_degrees(size):
    found = errors(size, (0, 2, 4, 6))
    for g in (0, 2, 4):
        assert found[g + 2] <= max(found[g] / 10, 1e-14)


@pytest.mark.parametrize(("m", "n"), [(11, 6), (23, 8), (47, 10)])
def test_oracle_6_match3_without_training(m, n):
    draws = torch.randint(m, (200, n))
    t = draws.double() * (2 * math.pi / m)
    cos, sin, zero, one = t.cos(), t.sin(), torch.zeros_like(t), torch.ones_like(t)
    q = torch.stack((cos, -cos, -sin, -sin, one), -1)
    k1 = torch.stack((cos, sin, sin, cos, zero), -1)
    k2 = torch.stack((cos, sin, cos, sin, zero), -1)
    q, k1, k2 = (x[:, None] for x in (q, k1, k2))
    sums = t[:, :, None, None] + t[:, None, :, None] + t[:, None, None]
    torch.testing.assert_close(logits(q, (k1, k2))[:, 0], sums.cos(), atol=1e-14, rtol=0)
    tau = (1 + math.cos(2 * math.pi / m)) / 2
    gap = (1 - math.cos(2 * math.pi / m)) / 2
    blank = torch.zeros(200, 1, 1, 5, dtype=torch.float64)
    keys = [
        torch.cat((k, blank.index_fill(3, torch.tensor(4), x)), 2)
        for k, x in ((k1, 1.0), (k2, tau))
    ]
    value = torch.ones(200, 1, n + 1, 1, dtype=torch.float64)
    value[:, :, -1] = 0
    scale = math.log(100 * n * n) / gap
    out = tensor_attention(q, keys, [value, value], scale=scale, form=EXACT).out[:, 0, :, 0]
    integers = draws[:, :, None, None] + draws[:, None, :, None] + draws[:, None, None]
    there = (integers % m == 0).flatten(2).any(-1)
    assert 0 < there.sum() < there.numel()
    assert torch.equal(out > 0.5, there)


def test_oracle_7_worked_example():
    given = (
        [[1, 0], [1, 1]], [[1, 2], [0, 1]], [[1, 0], [1, 1]], [[1, 2], [3, 4]], [[1, 1], [2, 0]],
    )  # fmt: skip
    q, k1, k2, v1, v2 = (torch.tensor(x, dtype=torch.float64)[None, None] for x in given)
    out = tensor_attention(q, (k1, k2), (v1, v2), form=EXACT).out.flatten().tolist()
    assert out == pytest.approx([2.6326, 1.3775, 2.6773, 0.8312], abs=5e-5)
    first = tensor_attention(q, (k1, k2), (v1, v2), causal(), form=EXACT).out[0, 0, 0]
    assert first.tolist() == pytest.approx([1, 2], abs=1e-12)


def test_oracle_8_weights_sum_to_one():
    q, keys, values = drawn()
    ones = [torch.ones_like(v) for v in values]
    for form in (EXACT, Form("features", degree=4, tolerance=math.inf)):
        out = tensor_attention(q, keys, ones, causal(), form=form).out
        torch.testing.assert_close(out, torch.ones_like(out), **TIGHT)


@pytest.mark.parametrize("form", [EXACT, Form("features", degree=2, tolerance=math.inf)])
@pytest.mark.parametrize("mask", [None, causal()])
def test_oracle_8_gradcheck_on_all_five_inputs(form, mask):
    q, keys, values = drawn(5, d=2, dv=2, heads=2, kv=1, batch=1)
    given = [x.requires_grad_() for x in (q, *keys, *values)]
    assert torch.autograd.gradcheck(
        lambda q, a, b, c, d: tuple(tensor_attention(q, (a, b), (c, d), mask, form=form)), given
    )


# -- masks, the tied form, gradients ---------------------------------------------------------------
MASKS = [
    None, causal(), window(2, 1), causal() & documents([0, 4, 4, 13]),
    causal() & padding([13, 8]), blocks(torch.rand(2, 4, 13, 13) > 0.3, 1),
]  # fmt: skip


def same(found, expected, given, tied=False):
    """Outputs and all gradients, where queries see something."""
    out, lse = expected
    seen = lse.isfinite()
    torch.testing.assert_close(found.out, out, **TIGHT)
    torch.testing.assert_close(found.lse, lse, **TIGHT)
    g, h = torch.randn_like(out), torch.randn_like(lse).where(seen, 0.0)
    lse = lse.where(seen, 0.0)
    ours = torch.autograd.grad((found.out, found.lse), given, (g, h))
    theirs = torch.autograd.grad((out, lse), given, (g, h))
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(mask)[:30])
@pytest.mark.parametrize(("order", "n"), [(3, 13), (4, 13)])
def test_a_tuple_is_seen_if_each_of_its_tokens_is(mask, order, n):
    q, keys, values = drawn(n, order=order)
    given = [x.requires_grad_() for x in (q, *keys, *values)]
    found = tensor_attention(q, keys, values, mask, form=EXACT)
    same(found, by_definition(q, keys, values, mask), given)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(mask)[:30])
def test_equal_factors_run_half_of_the_tuples(mask):
    q, (k, _), (v, _) = drawn()
    given = [x.requires_grad_() for x in (q, k, v)]
    found = tensor_attention(q, (k, k), (v, v), mask, form=EXACT)
    same(found, by_definition(q, (k, k), (v, v), mask), given)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(mask)[:30])
def test_long_sequences_keep_no_blocks(mask, monkeypatch):
    made = []

    class Watched(engine.Grounds):
        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            made.append(self)

    monkeypatch.setattr(method_file, "KEPT", 0)
    monkeypatch.setattr(method_file, "Grounds", Watched)
    q, keys, values = drawn()
    given = [x.requires_grad_() for x in (q, *keys, *values)]
    found = tensor_attention(q, keys, values, mask, form=EXACT)
    same(found, by_definition(q, keys, values, mask), given)
    assert [grounds.keep for grounds in made] == [False]
    assert not made[0]._blocks
    assert not made[0]._layouts


def test_equal_factors_visit_half_of_the_area(monkeypatch):
    areas = []
    core = engine.attention

    def watched(q, k, v, mask=None, *, layout=None, **more):
        tiles = layout.cols.numel() * layout.q_tile * layout.kv_tile if layout else 0
        areas.append(tiles)
        return core(q, k, v, mask, layout=layout, **more)

    monkeypatch.setattr(engine, "attention", watched)
    monkeypatch.setattr(engine, "_LEAST", 16)
    q, (k, other), (v, _) = drawn(256, heads=1, kv=1, batch=1)
    tensor_attention(q, (k, other), (v, v), causal(), form=EXACT)
    whole, areas[:] = sum(areas), []
    tensor_attention(q, (k, k), (v, v), causal(), form=EXACT)
    n = 256
    assert n**3 / 3 < whole < 1.6 * n**3 / 3  # the tiles that the diagonals cut are whole
    assert sum(areas) < 0.65 * whole


class Largest(TorchDispatchMode):
    """The most bytes that any operation returned in one tensor."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("mask", [None, causal()])
@pytest.mark.parametrize("form", [EXACT, Form("features", degree=2, tolerance=math.inf)])
def test_no_table_of_pairs_is_held(form, mask, monkeypatch):
    """Not even one of bools; there are a block's pseudo-queries, and masks of their cut tiles."""
    monkeypatch.setattr(method_file, "KEPT", 0)
    n = 512
    given = [torch.randn(1, 1, n, 2, requires_grad=True) for _ in range(5)]
    with Largest() as seen:
        out = tensor_attention(given[0], given[1:3], given[3:], mask, form=form).out
        if mask is None or form is not EXACT:
            out.sum().backward()
    assert seen.bytes < n * n
    if mask is None:
        assert seen.bytes <= 64 * n


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", [EXACT, Form("features", degree=4, tolerance=math.inf)])
def test_padding_changes_nothing(side, form):
    q, keys, values = drawn()
    pads = torch.tensor([0, 5])
    at = torch.arange(13) - pads[:, None] if side == "left" else None
    ctx = Context(mask=causal() & padding(13 - pads), q_positions=at, kv_positions=at)
    real = slice(5, None) if side == "left" else slice(0, 8)
    found = tensor_attention(q, keys, values, form=form, ctx=ctx)
    alone = tensor_attention(
        q[1:, :, real], [k[1:, :, real] for k in keys], [v[1:, :, real] for v in values], causal(),
        form=form,
    )  # fmt: skip
    torch.testing.assert_close(found.out[1:, :, real], alone.out, **TIGHT)
    assert found.out.isfinite().all()
    pad = torch.ones(2, 1, 13, 1, dtype=torch.bool)
    pad[0] = pad[1, :, real] = False
    noise = [x + 9 * torch.randn_like(x) * pad for x in (q, *keys, *values)]
    again = tensor_attention(noise[0], noise[1:3], noise[3:], form=form, ctx=ctx)
    torch.testing.assert_close(again.out[1:, :, real], alone.out, **TIGHT)


@pytest.mark.parametrize("form", [EXACT, Form("features", degree=4, tolerance=math.inf)])
@pytest.mark.parametrize("new", [1, 4])
def test_the_last_queries_alone(form, new):
    q, keys, values = drawn()
    whole = tensor_attention(q, keys, values, causal(), form=form)
    last = tensor_attention(q[:, :, -new:], keys, values, causal(), form=form)
    torch.testing.assert_close(last.out, whole.out[:, :, -new:], **TIGHT)


@pytest.mark.parametrize(("dtype", "band"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("form", [EXACT, Form("features", degree=6, tolerance=math.inf)])
def test_low_precision(dtype, band, form):
    q, keys, values = drawn(40)
    low = [x.to(dtype) for x in (q, *keys, *values)]
    found = tensor_attention(low[0], low[1:3], low[3:], causal(), form=form)
    high = [x.double() for x in low]
    expected = tensor_attention(high[0], high[1:3], high[3:], causal(), form=form)
    assert (found.out.dtype, found.lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(found.out.double(), expected.out, atol=band, rtol=band)


def test_a_sink_takes_its_share():
    q, keys, values = drawn()
    sinks = torch.randn(4, dtype=torch.float64)
    out, lse = by_definition(q, keys, values)
    found = tensor_attention(q, keys, values, form=EXACT, ctx=Context(sink_logits=sinks))
    share = torch.sigmoid(lse - sinks[:, None])[..., None]
    torch.testing.assert_close(found.out, out * share, **TIGHT)


# -- the approximation's checks --------------------------------------------------------------------
def test_the_bound_holds_and_is_at_most_the_papers():
    for order in (2, 3, 4):
        q, keys, _ = uniform(1.3, order, n=9)
        real = float(logits(q, keys).abs().max()) / 4
        top = max(float(x.abs().max()) for x in (q, *keys))
        assert real <= bound(q, keys, 1 / 4) <= top**order
    spike = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    spike[..., 0, 0] = 2.0
    assert bound(spike, (spike, spike), 0.25) == pytest.approx(2.0)  # both bounds are exact there


@pytest.mark.parametrize("kind", ["taylor", "chebyshev"])
@pytest.mark.parametrize("radius", [0.3, 1.0, 4.0])
def test_the_degree_is_the_lowest_that_keeps_the_error(kind, radius):
    g = degree_for(kind, radius, 1e-4)
    x = torch.linspace(-radius, radius, 10_001, dtype=torch.float64)
    step = 2 if kind == "taylor" else 1
    now, before = (
        float((polynomial(kind, d, radius)(x) / x.exp() - 1).abs().max()) for d in (g, g - step)
    )
    assert now <= 1e-4 < before
    assert (polynomial(kind, g, radius)(x) > 0).all()


def test_chebyshev_needs_no_higher_degree_than_taylor():
    for radius in (1.0, 3.0, 8.0):
        assert degree_for("chebyshev", radius, 1e-6) <= degree_for("taylor", radius, 1e-6)


def test_the_tolerance_is_kept():
    q, keys, values = uniform(1.5)
    right = tensor_attention(q, keys, values, form=EXACT).out
    most = float(values[0].abs().amax() * values[1].abs().amax())
    for tolerance in (1e-1, 1e-3, 1e-6):
        for kind in ("taylor", "chebyshev"):
            form = Form("features", tolerance=tolerance, polynomial=kind)
            out = tensor_attention(q, keys, values, form=form).out
            assert (out - right).abs().max() <= tolerance * most


def negative(size: float, d: int, n: int = 40):
    """In fp32, logits (at scale 1 / d) that are all near -size, where the terms cancel."""
    made = [1 - 0.1 * torch.rand(1, 1, n, d) for _ in range(3)]
    return -size * made[0], made[1:], [torch.rand(1, 1, n, 5) * 2 - 1 for _ in range(2)]


@pytest.mark.parametrize("mask", [None, causal()])
@pytest.mark.parametrize(("d", "size"), [(1, 8.0), (1, 12.0), (2, 10.0)])
def test_rounding_does_not_break_the_tolerance(d, size, mask):
    q, keys, values = negative(size, d)
    high = [[x.double() for x in xs] for xs in (keys, values)]
    right = tensor_attention(q.double(), *high, mask, form=EXACT)
    most = float(values[0].abs().amax() * values[1].abs().amax())
    given = [x.requires_grad_() for x in (q, *keys, *values)]
    for kind in ("taylor", "chebyshev"):
        form = Form("features", polynomial=kind)
        found = tensor_attention(q, keys, values, mask, form=form)
        assert (found.out.dtype, found.lse.dtype) == (torch.float32, torch.float32)
        assert (found.out - right.out).abs().max() <= form.tolerance * most
        assert (found.lse - right.lse).abs().max() <= form.tolerance
        grads = torch.autograd.grad(found.out.sum(), given)
        assert all(x.isfinite().all() and x.dtype == torch.float32 for x in grads)
    degree = degree_for("taylor", bound(q, keys, 1 / d), 5e-4)
    loose = Form("features", degree=degree, tolerance=math.inf)
    assert tensor_attention(q, keys, values, mask, form=loose).lse.isfinite().all()


def test_small_logits_stay_in_fp32_and_what_fp64_cannot_do_is_refused():
    for radius, dtype in ((1.0, torch.float32), (3.0, torch.float32), (6.0, torch.float64)):
        p = Form("features", radius=radius).chosen(0.0, 1)
        assert Form("features", radius=radius).precision(p, torch.float32) == dtype
        terms = sum(radius**t / math.factorial(t) for t in range(p.degree + 1))
        assert p.condition() == pytest.approx(terms / math.exp(-radius), rel=1e-2)
    with pytest.raises(InputError, match="cancel so far that even fp64"):
        tensor_attention(*negative(14.5, 1), form=Form("features"))


def test_too_large_logits_are_refused():
    q, keys, values = uniform(3.0)
    with pytest.raises(InputError, match=r"degree 2 is within .* tolerance is 0.001"):
        tensor_attention(q, keys, values, form=Form("features", degree=2))
    with pytest.raises(InputError, match="made for 1;"):
        tensor_attention(q, keys, values, form=Form("features", radius=1.0))
    with pytest.raises(InputError, match="max_rank=100"):
        tensor_attention(q / 20, keys, values, form=Form("features", max_rank=100))
    with pytest.raises(InputError, match="no polynomial of degree 60"):
        tensor_attention(q * 50, keys, values, form=Form("features"))


def test_an_odd_taylor_polynomial_that_turns_negative_is_refused():
    q, keys, values = uniform(2.0)
    assert float(polynomial("taylor", 3, 2.0)(torch.tensor(-2.0))) < 0
    with pytest.raises(InputError, match="degree 3 isn't positive"):
        tensor_attention(q, keys, values, form=Form("features", degree=3, tolerance=math.inf))


def test_short_sequences_are_exact_and_long_ones_approximated():
    q, keys, values = uniform(0.5)
    ctx = Context()
    tensor_attention(q, keys, values, form=Form(exact_up_to=40), ctx=ctx)
    assert not ctx.aux
    found = tensor_attention(q, keys, values, form=Form(exact_up_to=39), ctx=ctx)
    assert ctx.aux["logit_bound"] == pytest.approx(bound(q, keys, 0.25))
    same_ = tensor_attention(q, keys, values, form=Form("features"))
    assert torch.equal(found.out, same_.out)


@pytest.mark.parametrize(("batch", "n"), [(0, 5), (2, 0)])
@pytest.mark.parametrize("mask", [None, causal()])
@pytest.mark.parametrize("form", [EXACT, Form("features")])
def test_no_tokens(batch, n, mask, form):
    q, keys, values = drawn(n, batch=batch)
    found = tensor_attention(q, keys, values, mask, form=form)
    assert found.out.shape == (batch, 4, n, 5)
    assert found.lse.shape == (batch, 4, n)


@pytest.mark.parametrize("mask", [window(2, 1), causal() & documents([0, 4, 13])])
def test_masks_that_features_cannot_do_are_refused(mask):
    q, keys, values = drawn()
    with pytest.raises(InputError, match="neither causal nor full"):
        tensor_attention(q, keys, values, mask, form=Form("features"))


@pytest.mark.parametrize("given", [{"bias": torch.zeros(1)}, {"softcap": 3.0}, {"dropout": 0.1}])
def test_what_has_no_meaning_is_refused(given):
    q, keys, values = drawn()
    with pytest.raises(InputError, match=next(iter(given))):
        tensor_attention(q, keys, values, ctx=Context(**given))


def test_sums_over_all_tokens_come_with_the_scan():
    q, keys, values = drawn()
    p = polynomial("taylor", 3, 1.0)
    _, half = causal_scan(q[:, :, :6], [k[:, :, :6] for k in keys], [v[:, :, :6] for v in values],
                          p, 0.3)  # fmt: skip
    rest, whole = causal_scan(q[:, :, 6:], [k[:, :, 6:] for k in keys],
                              [v[:, :, 6:] for v in values], p, 0.3, None, half)  # fmt: skip
    at_once, sums = causal_scan(q, keys, values, p, 0.3)
    torch.testing.assert_close(rest.out, at_once.out[:, :, 6:], **TIGHT)
    for one, two in zip(whole, sums):
        torch.testing.assert_close(one, two, **TIGHT)


def test_autocast_does_not_narrow_the_features():
    given = [x.float() for x in (lambda q, k, v: (q, *k, *v))(*drawn(40))]
    form = Form("features", degree=6, tolerance=math.inf)
    plain = tensor_attention(given[0], given[1:3], given[3:], causal(), form=form).out
    with torch.autocast("cpu", torch.bfloat16):
        cast = tensor_attention(given[0], given[1:3], given[3:], causal(), form=form).out
    torch.testing.assert_close(cast, plain, atol=1e-6, rtol=1e-6)
