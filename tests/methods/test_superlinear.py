"""Superlinear attention: the oracles of its spec, its search, padding and counted work."""

from __future__ import annotations

import math

import pytest
import torch

from foveate import Context, attention, causal, padding
from foveate.methods.superlinear import Superlinear
from foveate.methods.superlinear.attention import tile_for
from foveate.methods.superlinear.powers import (
    counted,
    distances,
    floor_pow,
    reach,
    read,
    window_length,
)
from foveate.methods.superlinear.search import best_anchors
from foveate.ops.errors import InputError
from foveate.parts import Heads
from foveate.parts.growth import exponent
from foveate.parts.lifetimes import layout_of_spans

DIM = 24


def layer(dtype=torch.float64, kv=2, width=8, value_width=8, **more):
    return Superlinear(**more).build(Heads(DIM, 4, kv, width, value_width)).to(dtype)


def tensors(length, batch=2, kv=2, width=8, value_width=8, q_len=None, dtype=torch.float64):
    shapes = (4, q_len or length, width), (kv, length, width), (kv, length, value_width)
    return tuple(torch.randn(batch, *shape, dtype=dtype) for shape in shapes)


def context(length, batch=2, dtype=torch.float64, **more):
    hidden = torch.randn(batch, length, DIM, dtype=dtype)
    return Context(mask=causal(), hidden=hidden, **more)


def anchors_of(t, index, first=0):
    """Step 1 for p = 1/2, one by one."""
    found, m = [], index + 1
    while t + 1 - m * m >= first:
        found.append(t + 1 - m * m)
        m += 1
    return found


def spans_of(t, sigma, made, first=0):
    """Steps 2 and 3 for p = p_s = 1/2: the chosen anchors and [start, end], both inclusive."""
    w = (made.index + 1) ** 2 - 1
    window_start = max(0, t - w + 1)
    best = sorted(sigma, key=lambda a: sigma[a], reverse=True)[: made.spans]
    n = t + 1 - first
    back, ahead = (math.ceil(b * math.sqrt(n)) for b in (made.backward, made.forward))
    return [
        (a, max(first, a - back), min(a + ahead, t, window_start - 1 if w else t)) for a in best
    ]


def by_definition(made, q, k, v, routing, first=None):
    """Steps 1 to 5, a query at a time."""
    r, w = made.recipe, made.window
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        start = 0 if first is None else first[b]
        for h in range(q.shape[1]):
            key, value = k[b, h // group], v[b, h // group]
            for row in range(q.shape[2]):
                t = row + k.shape[2] - q.shape[2]
                if t < start:
                    continue
                sigma = {a: routing[b, h, row] @ key[a] for a in anchors_of(t, r.index, start)}
                chosen = spans_of(t, sigma, r, start)
                near = range(max(start, t - w + 1), t + 1) if w else range(0)
                parts = []
                for _, low, high in chosen or [(None, 0, -1)]:
                    at = torch.tensor([*range(low, high + 1), *near])
                    weights = torch.softmax(q[b, h, row] @ key[at].T / math.sqrt(q.shape[3]), 0)
                    parts.append(weights @ value[at])
                gates = torch.ones(1, dtype=q.dtype)
                if chosen:
                    gates = torch.softmax(torch.stack([sigma[a] for a, _, _ in chosen]), 0)
                out[b, h, row] = gates @ torch.stack(parts)
    return out


# -- the spec's oracles ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "more",
    [{"index": 3}, {"index": 0}, {"index": 3, "backward": 3.0, "forward": 1.0},
     {"index": 1, "spans": 2, "forward": 2.0}],
)  # fmt: skip
def test_oracle_1_anchors_and_spans_are_those_of_a_loop(more):
    made = layer(**more)
    q, k, _ = tensors(80)
    routing = torch.randn_like(q)
    found = made.routes(routing, k, torch.zeros(2, dtype=torch.int64))
    for b in range(2):
        for h in range(4):
            for t in range(80):
                anchors = anchors_of(t, made.recipe.index)
                sigma = {a: routing[b, h, t] @ k[b, h // 2, a] for a in anchors}
                wanted = spans_of(t, sigma, made.recipe)
                wanted += [(-1, 0, -1)] * (made.recipe.spans - len(wanted))
                got = [x[b, h, t] for x in found]
                assert [(a, s, e + 1) for a, s, e in wanted] == list(
                    zip(*(x.tolist() for x in got))
                )


@pytest.mark.parametrize("more", [{}, {"index": 3}, {"index": 2, "forward": 1.0}, {"spans": 1}])
def test_oracle_1_the_whole_is_that_of_a_loop(more):
    made = layer(value_width=5, **more)
    q, k, v = tensors(60, value_width=5)
    ctx = context(60)
    result = made(q, k, v, ctx)
    expected = by_definition(made, q, k, v, made.routes_with(ctx, q))
    torch.testing.assert_close(result.out, expected)
    assert result.lse.isnan().all()


def holes(t, power, span_power, backward):
    """Positions up to t that no candidate span covers."""
    behind = [d for d in distances(t + 1, power, 1) if d <= t]
    back = int(reach(backward, torch.tensor(t + 1), span_power))
    seen = [False] * (t + 1)
    for d in behind:
        for i in range(max(0, t - d - back), t - d + 1):
            seen[i] = True
    return seen.count(False)


@pytest.mark.parametrize(
    ("power", "span_power"), [(0.5, 0.5), (0.54, 0.46), (0.55, 0.5)]
)  # fmt: skip
def test_oracle_2_candidate_spans_cover_everything(power, span_power):
    assert not any(holes(t, power, span_power, 2.0) for t in range(0, 3001, 37))
    assert not any(holes(t, power, span_power, 2.0) for t in range(400))


def test_oracle_2_shorter_spans_do_not():
    found = [holes(t, 0.5, 0.5, 1.0) for t in range(0, 3001, 37)]
    assert (len(found), sum(found)) == (82, 27858)


@pytest.mark.parametrize("index", [7, 20])
def test_oracle_3_a_window_over_everything_is_dense(index):
    made = layer(index=index)
    q, k, v = tensors(63)
    dense = attention(q, k, v, causal(), backend="reference").out
    torch.testing.assert_close(made(q, k, v, context(63)).out, dense, atol=1e-14, rtol=0)


def test_oracle_4_one_span_back_to_the_first_token_and_a_window_are_dense():
    made = layer(spans=1, index=3, backward=1e6)
    q, k, v = tensors(90)
    near = k.repeat_interleave(2, 1).roll(15, 2)  # the nearest anchor stands 15 before its query
    routing = 1e3 * near / near.square().sum(-1, keepdim=True)
    k = k / k.square().sum(-1, keepdim=True).sqrt()
    first = torch.zeros(2, dtype=torch.int64)
    routes = made.routes(routing, k, first)
    assert torch.equal(routes.anchors[0, 0, :, 0], (torch.arange(90) - 15).clamp_min(-1))
    got = made.mixed(q, k, v, routing, routes, first, Context(mask=causal()))
    dense = attention(q, k, v, causal(), backend="reference").out
    torch.testing.assert_close(got, dense, atol=1e-12, rtol=0)


def test_oracle_4_several_long_spans_are_not():
    made = layer(spans=3, index=3, backward=1e6)
    q, k, v = tensors(90)
    dense = attention(q, k, v, causal(), backend="reference").out
    assert (made(q, k, v, context(90)).out - dense).abs().max() > 0.1


def test_oracle_5_one_span_teaches_routing_nothing():
    made = layer(spans=1, index=1)
    made(*tensors(50), context(50)).out.square().sum().backward()
    assert made.routing.weight.grad.abs().max() == 0


@pytest.mark.parametrize("spans", [2, 3])
def test_oracle_5_gradients_through_the_gates(spans):
    made = layer(spans=spans, kv=1, width=1, value_width=1)
    q, k, v = tensors(10, batch=1, kv=1, width=1, value_width=1)
    q = q[:, :2]
    routing = torch.randn_like(q)
    first = torch.zeros(1, dtype=torch.int64)
    routes = made.routes(routing, k, first)

    def run(q, k, v, routing):
        return made.mixed(q, k, v, routing, routes, first, Context(mask=causal()))

    inputs = [x.clone().requires_grad_() for x in (q, k, v, routing)]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.grad(run(*inputs).square().sum(), inputs[3])[0].abs().max() > 0


def test_oracle_5_gradients_are_those_of_the_loop():
    made = layer(index=1, forward=1.0)
    inputs = [x[:1].requires_grad_() for x in tensors(40)]
    ctx = context(40, batch=1)
    weight = torch.randn(1, 4, 40, 8, dtype=torch.float64)
    inputs.append(made.routing.weight)
    ours = (made(*inputs[:3], ctx).out * weight).sum()
    loop = (by_definition(made, *inputs[:3], made.routes_with(ctx, inputs[0])) * weight).sum()
    for one, two in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(loop, inputs)):
        torch.testing.assert_close(one, two)
        assert two.abs().max() > 0


def test_oracle_6_later_tokens_change_nothing():
    made = layer(index=2)
    q, k, v = tensors(70)
    ctx = context(70)
    first = torch.zeros(2, dtype=torch.int64)

    def run():
        return made(q, k, v, ctx).out, made.routes(made.routes_with(ctx, q), k, first)

    before, routes = run()
    for x in (q, k, v):
        x[:, :, 40:] = 100 * torch.randn_like(x[:, :, 40:])
    ctx.hidden[:, 40:] = torch.randn_like(ctx.hidden[:, 40:])
    after, others = run()
    for one, two in zip(routes, others):
        assert torch.equal(one[:, :, :40], two[:, :, :40])
    torch.testing.assert_close(after[:, :, :40], before[:, :, :40], atol=1e-13, rtol=0)
    assert not torch.allclose(after[:, :, 40:], before[:, :, 40:])


@pytest.mark.parametrize("cuts", [(1,) * 70, (33, 1, 1, 20, 15), (64, 6)])
@pytest.mark.parametrize("index", [0, 2])
def test_oracle_6_chunks_and_steps_are_the_whole(cuts, index):
    made = layer(torch.float32, index=index)
    q, k, v = tensors(70, dtype=torch.float32)
    ctx = context(70, dtype=torch.float32)
    expected = made(q, k, v, ctx).out
    got, done = [], 0
    for n in cuts:
        part = Context(mask=causal(), hidden=ctx.hidden[:, done : done + n])
        rows = q[:, :, done : done + n]
        done += n
        got.append(made(rows, k[:, :, :done], v[:, :, :done], part).out)
    torch.testing.assert_close(torch.cat(got, 2), expected, atol=1e-5, rtol=1e-5)


def test_oracle_7_weights_of_a_row_sum_to_one():
    made = layer(index=1)
    q, k, v = tensors(60)
    out = made(q, k, torch.ones_like(v), context(60)).out
    torch.testing.assert_close(out, torch.ones_like(out))


def test_oracle_7_the_worked_example():
    assert [24 - d for d in distances(25, 0.5, 1)] == [24, 21, 16, 9, 0]
    assert [24 - d for d in distances(25, 0.5, 4)] == [9, 0]
    assert window_length(3, 0.5) == 15
    made = layer(index=3)
    q, k, _ = tensors(25, q_len=1)
    found = made.routes(torch.randn_like(q), k, torch.zeros(2, dtype=torch.int64))
    spans = {(a, low, high - 1) for a, low, high in zip(*(x[0, 0, 0].tolist() for x in found))}
    assert spans == {(9, 0, 9), (0, 0, 0), (-1, 0, -1)}


def test_oracle_8_what_all_scores_share_changes_nothing():
    made = layer(index=1)
    q, k, v = tensors(60)
    ctx = context(60)
    before = made(q, k, v, ctx).out
    scores = type(made).scores
    made.scores = lambda *given: scores(made, *given).where(given[2] < 0, scores(made, *given) + 7)
    torch.testing.assert_close(made(q, k, v, ctx).out, before)


def test_oracle_8_sharp_routing_is_the_best_span_alone():
    made, one = layer(index=1), layer(spans=1, index=1)
    q, k, v = tensors(60)
    ctx = context(60)
    one.load_state_dict(made.state_dict())
    expected = one(q, k, v, ctx).out
    with torch.no_grad():
        made.routing.weight.mul_(1e9)
    torch.testing.assert_close(made(q, k, v, ctx).out, expected, atol=1e-6, rtol=0)


# -- the search ------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [9, 40, 200])
@pytest.mark.parametrize("first", [(0, 0), (0, 7)])
def test_moving_keys_scores_what_gathering_them_does(length, first, monkeypatch):
    q, k, _ = tensors(length)
    behind, first = distances(length, 0.5, 2), torch.tensor(first)
    moved = best_anchors(q, k, behind, first, 3)
    one_by_one = [
        best_anchors(q[:, :, t : t + 1], k[:, :, : t + 1], behind, first, 3) for t in range(length)
    ]
    assert torch.equal(moved, torch.cat(one_by_one, 2))
    monkeypatch.setattr("foveate.methods.superlinear.search._NUMBERS", 2 * 4 * 8 * 11)
    assert torch.equal(best_anchors(q, k, behind, first, 3), moved)


def test_of_equal_scores_the_nearer_anchor_is_taken():
    q, k, _ = tensors(50)
    found = best_anchors(q, torch.ones_like(k), distances(50, 0.5, 1), torch.zeros(2).long(), 3)
    assert found[0, 0, 49].tolist() == [49, 46, 41]
    assert found[0, 0, 2].tolist() == [2, -1, -1]


@pytest.mark.parametrize(
    ("power", "roots"), [(1 / 2, 2), (1 / 3, 3), (1 / 4, 4), (1 / 5, 5), (1 / 6, 6)]
)
def test_powers_are_exact_where_they_are_whole(power, roots):
    for m in (1, 2, 3, 7, 10, 99, 1000, 46341):
        assert floor_pow(m, power) == m**roots
    assert floor_pow(32, 0.54) == math.floor(32 ** (1 / 0.54))


def test_reaches_are_exact_at_squares():
    n = torch.arange(1, 5000)
    exact = [math.isqrt(4 * i - 1) + 1 for i in n.tolist()]  # ceil(sqrt(4 i))
    assert reach(2.0, n, 0.5).tolist() == exact


# -- padding, shapes, refusals ---------------------------------------------------------------------
@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nowhere(side, index):
    made = layer(index=index, forward=1.0)
    q, k, v = tensors(60)
    ctx = context(60)
    index_ = torch.arange(60)
    padded = Context(mask=causal() & padding([60, 43]), hidden=ctx.hidden)
    real = slice(0, 43)
    if side == "left":
        padded.q_positions = padded.kv_positions = index_ - torch.tensor([[0], [17]])
        real = slice(17, 60)
    got = made(q, k, v, padded).out
    whole = Context(mask=causal(), hidden=ctx.hidden[:1])
    torch.testing.assert_close(got[:1], made(q[:1], k[:1], v[:1], whole).out)
    alone = Context(mask=causal(), hidden=ctx.hidden[1:, real])
    expected = made(*(x[1:, :, real] for x in (q, k, v)), alone).out
    torch.testing.assert_close(got[1:, :, real], expected)
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    made = layer(dtype, index=3)
    q, k, v = tensors(200, dtype=dtype)
    ctx = context(200, dtype=dtype)
    result = made(q, k, v, ctx)
    assert result.out.dtype == dtype
    first = torch.zeros(2, dtype=torch.int64)
    routing = made.routes_with(ctx, q)
    routes = made.routes(routing, k, first)
    wide = [x.double() for x in (q, k, v, routing)]
    expected = made.mixed(*wide, routes, first, Context(mask=causal(), backend="blocks"))
    band = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(result.out.double(), expected, atol=band, rtol=band)
    result.out.float().square().sum().backward()
    assert made.routing.weight.grad.isfinite().all()


def test_what_does_not_fit_is_refused():
    from foveate import window

    made = layer()
    q, k, v = tensors(30)
    with pytest.raises(InputError, match=r"expected ctx.hidden \(2, 30, 24\), got None"):
        made(q, k, v, Context(mask=causal()))
    with pytest.raises(InputError, match="must be causal"):
        made(q, k, v, Context(hidden=torch.randn(2, 30, 24)))
    with pytest.raises(InputError, match="must be causal"):
        made(q, k, v, Context(mask=window(5, 0), hidden=torch.randn(2, 30, 24)))
    with pytest.raises(InputError, match="no bias"):
        made(q, k, v, context(30, bias=torch.zeros(30, 30)))
    for bad in ({"spans": 0}, {"index": -1}, {"power": 1.5}, {"span_power": 0}, {"backward": -1}):
        with pytest.raises(InputError, match=next(iter(bad))):
            Superlinear(**bad)


# -- counted work ----------------------------------------------------------------------------------
def test_counted_pairs_are_those_of_the_nearest_anchors():
    made = layer(index=2)
    q, k, _ = tensors(150)
    first = torch.zeros(2, dtype=torch.int64)
    found = made.routes(torch.zeros_like(q), k, first)  # equal scores: the nearest
    counts = counted(150, index=2)
    assert int((found.high - found.low)[0, 0].sum()) == counts.span
    assert counts.search == sum(len(anchors_of(t, 2)) for t in range(150))
    assert counts.window == sum(min(t + 1, 8) for t in range(150))
    other = made.routes(torch.randn_like(q), k, first)
    assert (other.high - other.low).sum((2, 3)).max() <= counts.span


def test_search_pairs_and_shares_are_the_papers():
    """The spec's table; its spans differ from ours by a constant 268 pairs among the first few."""
    shares = {1024: 0.299, 4096: 0.148, 16384: 0.073, 65536: 0.037}
    search = {1024: 21_360, 4096: 172_768, 16384: 1_390_016, 65536: 11_152_256}
    for length, share in shares.items():
        found = counted(length)
        assert found.search == search[length]
        assert found.total / (length * (length + 1) / 2) == pytest.approx(share, abs=6e-4)


def test_counted_work_grows_as_the_length_to_three_halves():
    lengths = [4096, 8192, 16384, 32768, 65536]
    assert exponent(lengths, [counted(n).total for n in lengths]) == pytest.approx(1.5, abs=0.02)
    assert Superlinear(index=3).pairs(5000) == counted(5000, index=3).total
    upscaled = [counted(n, power=0.54, span_power=0.54).total for n in lengths]
    assert exponent(lengths, upscaled) == pytest.approx(1.54, abs=0.02)


def test_a_step_at_a_million_tokens_reads_less_than_a_hundredth():
    searched, attended = read(1_000_000 - 1)
    assert (searched, attended) == (1000, 3 * 2001)
    assert (searched + 2 * attended) / (2 * 1_000_000) < 0.007


def test_the_engine_visits_little_more_than_the_spans():
    made = layer(torch.float32, kv=1)
    q, k, _ = tensors(2048, batch=1, kv=1, dtype=torch.float32)
    found = made.routes(torch.randn_like(q), k, torch.zeros(1, dtype=torch.int64))
    low, high = (x.transpose(2, 3).flatten(1, 2) for x in (found.low, found.high))
    part = layout_of_spans(low, high, 2048, tile_for(2048), by_end=True)
    assert part.pairs == pytest.approx(float((high - low).sum((0, 2)).double().mean()))
    assert part.tile_area < 2.5 * part.pairs


@pytest.mark.parametrize("by_end", [False, True])
def test_spans_as_a_layout(by_end):
    low = torch.randint(0, 130, (2, 3, 150))
    high = low + torch.randint(-3, 60, (2, 3, 150))
    low[0, 0, :70], high[0, 0, :70] = 0, 137
    part = layout_of_spans(low, high, 137, (16, 8), by_end=by_end).checked()
    keys = torch.arange(137)
    want = (keys >= low[..., None]) & (keys < high[..., None])
    assert torch.equal(part.dense(), want)
    assert (part.kinds == 0).any()


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("q_len", "length"), [(9, 7), (20, 7), (2, 1)])
def test_queries_before_the_first_key_see_nothing(index, q_len, length):
    made = layer(index=index)
    q, k, v = tensors(length, q_len=q_len)
    ctx = context(q_len)
    got, off = made(q, k, v, ctx).out, q_len - length
    assert (got[:, :, :off] == 0).all()
    routing = made.routes_with(ctx, q)[:, :, off:]
    expected = by_definition(made, q[:, :, off:], k, v, routing)
    torch.testing.assert_close(got[:, :, off:], expected)
