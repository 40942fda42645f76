"""SEA: the sheet's oracles, and what only it does."""

from __future__ import annotations

import math

import pytest
import torch

import foveate
from foveate import Context, attention, causal, padding
from foveate.methods import make
from foveate.methods.sea import SEA, performer
from foveate.methods.sea.compress import bins_of, budgets, firsts, keep_best
from foveate.methods.sea.estimator import Estimate, resized_identity
from foveate.methods.sea.layout import Stretch, layout_of
from foveate.methods.sea.losses import Teacher, layer_losses
from foveate.ops.errors import InputError
from foveate.parts import Heads, StateCache

CAUSAL = Context(mask=causal())
FORMS = pytest.mark.parametrize("form", ["causal", "bidirectional"])


def built(heads=4, kv=2, dim=16, value=16, dtype=torch.float64, form="causal", **fields):
    fields = {"k": 6, "width": 16, "divisor": 2.0, "max_length": 256} | fields
    recipe = SEA(causal=form == "causal", **fields)
    made = recipe.build(Heads(32, heads, kv, dim, value)).to(dtype).eval()
    return made


def tensors(length, batch=2, heads=4, kv=2, dim=16, value=16, dtype=torch.float64):
    shapes = (batch, heads, length, dim), (batch, kv, length, dim), (batch, kv, length, value)
    return tuple(torch.randn(s, dtype=dtype) for s in shapes)


def context(form):
    return Context(mask=causal()) if form == "causal" else Context()


def open_gates(method):
    """Let all of the sparse context through, and nothing of the average."""
    gates = method.estimator.encoder.gates
    gates.weight.data.zero_()
    gates.bias.data.fill_(50.0)
    return method


# -- the mask --------------------------------------------------------------------------------------
@FORMS
@pytest.mark.parametrize("length", [1, 7, 70])
def test_oracle_1_with_every_bin_kept_it_is_dense_attention(form, length):
    q, k, v = tensors(length)
    out = open_gates(built(form=form, k=length))(q, k, v, context(form)).out
    exact = attention(q, k, v, context(form).mask, backend="reference").out
    torch.testing.assert_close(out, exact, atol=1e-6, rtol=1e-6)


def row_bins(t, total, width):
    """What each key of row t reads; `width` is off."""
    found = bins_of(torch.arange(total), torch.tensor(t + 1), width)
    return torch.where(torch.arange(total) <= t, found, width).tolist()


def test_oracle_2_the_index_map():
    wanted = [[1], [0, 2], [0, 1, 2], [0, 1, 1, 2], [0, 0, 1, 2, 2], [0, 0, 1, 1, 2, 2]]
    for t, bins in enumerate(wanted):
        assert row_bins(t, 6, 3) == bins + [3] * (5 - t)
    assert row_bins(2, 3, 8) == [1, 3, 6]


@pytest.mark.parametrize("width", [3, 16, 256])
def test_first_keys_of_bins_agree_with_the_index_map(width):
    for n in (1, 2, 15, 16, 17, 255, 256, 257, 1000, 4097):
        bins = bins_of(torch.arange(n), torch.tensor(n), width)
        starts = firsts(torch.tensor(n), width)
        for m in {0, 1, width // 2, width - 2, width - 1}:
            assert (bins == m).nonzero()[:, 0].tolist() == list(range(starts[m], starts[m + 1]))


def kept_keys(probs, k, group="causal_batch"):
    """(B, H, L, L) bool by the definition, and by the layout."""
    batch, heads, length, width = probs.shape
    seen = torch.arange(1, length + 1)[None]
    keep = keep_best(probs, budgets(k, seen, width, heads, group, length), group)
    index = bins_of(torch.arange(length), seen[0, :, None], width)
    dense = keep.gather(3, index.expand(batch, heads, -1, -1)).tril()
    layout = layout_of(keep, Stretch(seen.expand(batch, -1), torch.zeros(batch).long(), length))
    return dense, layout


@pytest.mark.parametrize("shape", [(2, 3, 1, 8), (1, 2, 130, 16), (2, 4, 97, 64), (1, 1, 300, 12)])
@pytest.mark.parametrize("group", ["causal_batch", "query"])
def test_the_layout_is_the_stretched_mask(shape, group):
    dense, layout = kept_keys(torch.softmax(3 * torch.randn(shape), -1), 5, group)
    assert torch.equal(layout.dense(), dense)
    assert layout.checked() is layout


@pytest.mark.parametrize(("length", "width", "k", "heads"), [(128, 32, 8, 4), (2048, 256, 64, 12)])
def test_oracle_3_about_k_keys_are_kept(length, width, k, heads):
    probs = torch.rand(1, heads, length, width)
    seen = torch.arange(1, length + 1)[None]
    keep = keep_best(probs, budgets(k, seen, width, heads, "causal_batch", length), "causal_batch")
    rows = [0, length // 2, length - 1] + ([8, 64] if length == 128 else [])
    for t in rows:
        index = bins_of(torch.arange(t + 1), torch.tensor(t + 1), width)
        mean = keep[0, :, t][:, index].sum().item() / heads
        if t == 0:
            assert mean == 1
        else:  # by rounding of bins to whole keys, which is finer in long rows
            assert mean == pytest.approx(min(k, t + 1), abs=1.0 if length == 128 else 0.5)


def test_budgets_are_rounded_and_bounded():
    n = torch.tensor([1, 5, 40, 100_000])
    assert budgets(4, n, 32, 2, "query", 9).tolist() == [32, 26, 3, 1]
    assert budgets(4, n, 32, 2, "causal_batch", 9).tolist() == [64, 51, 6, 1]
    assert budgets(4, n, 32, 2, "head", 10).tolist() == [320, 256, 32, 1]
    assert budgets(4, n, 32, 2, "batch", 10).tolist() == [640, 512, 64, 1]


def test_of_equal_bins_the_first_are_kept():
    keep = keep_best(torch.full((1, 2, 1, 4), 0.25), torch.tensor([[3]]), "causal_batch")
    assert keep[0, :, 0].tolist() == [[True, True, True, False], [False] * 4]
    probs = torch.tensor([0.1, 0.4, 0.4, 0.1]).expand(1, 1, 1, 4)
    assert keep_best(probs, torch.tensor([[3]]), "query").flatten().tolist() == [True] * 3 + [False]


def test_oracle_8_doubling_k_doubles_the_mask_until_it_is_full():
    probs = torch.rand(1, 4, 512, 64)
    sizes = [kept_keys(probs, k)[1].pairs for k in (8, 16, 32, 512)]
    assert sizes[1] / sizes[0] == pytest.approx(2, rel=0.05)
    assert sizes[2] / sizes[1] == pytest.approx(2, rel=0.1)
    assert sizes[3] == 512 * 513 / 2


@pytest.mark.parametrize("factor", [2, 3])
def test_oversampling_keeps_every_so_manieth_key_of_more_bins(factor):
    q, k, v = tensors(120, batch=1)
    found = []
    ctx = Context(mask=causal(), stats=lambda layout, **_: found.append(layout))
    method = built(oversample=factor)
    method(q, k, v, ctx)
    more = built(k=6 * factor)
    more.load_state_dict(method.state_dict())
    more(q, k, v, ctx)
    thinned, whole = (layout.dense() for layout in found)
    every = torch.arange(120) % factor == 0
    assert torch.equal(thinned, whole & every)


# -- the estimator ---------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [40, 97])
def test_oracle_4_later_tokens_change_nothing(length):
    method = built(dtype=torch.float32)
    q, k, v = tensors(length, dtype=torch.float32)
    found = []
    ctx = Context(mask=causal(), stats=lambda layout, **_: found.append(layout.dense()))
    method.trace = []
    once = method(q, k, v, ctx).out
    for cut in (1, 17, length - 1):
        changed = [torch.cat((x[:, :, :cut], torch.randn_like(x[:, :, cut:])), 2)
                   for x in (q, k, v)]  # fmt: skip
        again = method(*changed, Context(mask=causal(), stats=ctx.stats)).out
        one, two = method.trace[0].scores, method.trace[-1].scores
        assert torch.equal(one[:, :, :cut], two[:, :, :cut])
        assert torch.equal(found[0][:, :, :cut], found[-1][:, :, :cut])
        torch.testing.assert_close(again[:, :, :cut], once[:, :, :cut], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(again[:, :, cut:], once[:, :, cut:])


def table(q, k, width):
    """The true attention averaged over each row's bins, as scores: log of (B, H, L, K)."""
    length = q.shape[2]
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    p = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
    index = bins_of(torch.arange(length), torch.arange(1, length + 1)[:, None], width)
    index = index.expand_as(p)
    total = p.new_zeros(*p.shape[:3], width).scatter_add(3, index, p)
    count = p.new_zeros(*p.shape[:3], width).scatter_add(3, index, (p > 0).to(p.dtype))
    return (total / count.clamp_min(1) + 1e-30).log()


def test_oracle_5_with_the_true_attention_in_place_of_the_estimate():
    q, k, v = tensors(96)
    q = 3 * q
    exact = attention(q, k, v, causal(), backend="reference").out
    errors = []
    for keys in (2, 4, 8, 16, 32, 96):
        method = open_gates(built(k=keys, width=24))
        scores = table(q, k, 24)

        def known(split, at, past, method=method, scores=scores):
            gates = scores.new_full((*scores.shape[:3], 2), 50.0)
            return Estimate(scores, gates), past

        method._estimate = known
        layouts = []
        ctx = Context(mask=causal(), stats=lambda layout, out=layouts, **_: out.append(layout))
        errors.append((method(q, k, v, ctx).out - exact).norm().item())
        # The best bins of each row over all heads are in the mask.
        top = scores.transpose(1, 2).flatten(2).topk(1, -1).indices[0, 95, 0]
        h, m = divmod(int(top), 24)
        start = firsts(torch.tensor(96), 24)
        assert layouts[0].dense()[0, h, 95, start[m] : start[m + 1]].all()
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.5 * errors[-2]
    assert errors[-1] < 1e-9


def test_oracle_6_features_give_the_exponential_kernel():
    q, k = torch.randn(2, 1, 1, 40, 8, dtype=torch.float64) * 0.5
    w = performer.draw(4096, 8, torch.Generator().manual_seed(0)).double()
    a, b = (performer.softmax_features(x, w, keys=False, shift=False, eps=0.0) for x in (q, k))
    found = (a @ b.mT).flatten()
    exact = (q @ k.mT / math.sqrt(8)).exp().flatten()
    assert ((found - exact).abs().sum() / exact.sum()).item() < 0.05


def test_features_are_orthogonal_and_counted_as_the_paper_does():
    assert performer.feature_count(16, 1) == 44
    assert performer.feature_count(64, 8) == 33
    w = performer.draw(20, 8)
    unit = torch.nn.functional.normalize(w, dim=1)
    torch.testing.assert_close(unit[:8] @ unit[:8].mT, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 63, 64, 150])
def test_the_causal_performer_is_its_sum(length):
    q, k = torch.rand(2, 2, 3, length, 5, dtype=torch.float64)
    v = torch.randn(2, 3, length, 4, dtype=torch.float64)
    out, sums = performer.causal(q, k, v)
    weights = (q @ k.mT).tril()
    torch.testing.assert_close(out, weights @ v / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(sums.values, k.mT @ v)
    cut = length // 2
    if cut:
        first, held = performer.causal(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut])
        rest, last = performer.causal(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], held)
        torch.testing.assert_close(torch.cat((first, rest), 2), out)
        torch.testing.assert_close(last.ones, sums.ones)


def test_the_bidirectional_performer_is_its_sum():
    q, k = torch.rand(2, 2, 3, 9, 5, dtype=torch.float64)
    v = torch.randn(2, 3, 9, 4, dtype=torch.float64)
    weights = q @ k.mT
    expected = weights @ v / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(performer.bidirectional(q, k, v), expected)


def test_the_identity_is_resized_to_the_tokens():
    torch.testing.assert_close(resized_identity(5, 5), torch.eye(5, dtype=torch.float64))
    wide = resized_identity(9, 5)
    assert wide[0].tolist() == [1, 0, 0, 0, 0]
    assert wide[1].tolist() == [0.5, 0.5, 0, 0, 0]
    assert wide[-1].tolist() == [0, 0, 0, 0, 1]


def test_a_row_of_the_cnn_sees_nine_rows():
    cnn = built().estimator.cnn
    image = torch.randn(1, 8, 30, 4, dtype=torch.float64, requires_grad=True)
    before = torch.zeros(1, 8, 8, 4, dtype=torch.float64)
    at = torch.arange(30)[None]
    scores, _ = cnn(image, before, at)
    (grad,) = torch.autograd.grad(scores[0, :, 20].square().sum(), image)
    seen = grad.abs().sum((0, 1, 3)).nonzero()[:, 0].tolist()
    assert seen == [12, 14, 16, 18, 20]


def test_parameters_are_as_many_as_the_sheet_counts():
    for form, factor, cnn in (("causal", 2 / 4, 74), ("bidirectional", 4 / 2, 324)):
        heads, d, width = 12, 64, 256
        made = built(heads, heads, d, d, form=form, width=width).estimator
        counted = sum(p.numel() for name, p in made.named_parameters() if name != "positions")
        expected = 6 * d * d + 2 * d * factor * width + cnn * heads**2
        assert counted == pytest.approx(expected, rel=0.03)


# -- outputs ---------------------------------------------------------------------------------------
def by_hand(method, q, k, v, scores, gates, causally):
    """Steps 7 to 11 of the sheet for one sequence, element by element: (H, L, Dv)."""
    heads, length = q.shape[:2]
    k, v = (x.repeat_interleave(heads // len(k), 0) for x in (k, v))
    probs = scores.softmax(-1)
    order = lambda x: x.round(decimals=10).sort(descending=True, stable=True).indices  # noqa: E731
    width = probs.shape[-1]
    group = method.recipe.chosen_group
    n = torch.arange(1, length + 1) if causally else torch.full((length,), length)
    out = torch.zeros(heads, length, v.shape[-1], dtype=q.dtype)
    if group == "batch":
        budget = budgets(method.recipe.k, torch.tensor(length), width, heads, group, length)
        chosen = set(order(probs.flatten())[: int(budget)].tolist())
    for t in range(length):
        if group == "causal_batch":
            budget = min(max(round(heads * method.recipe.k * width / (t + 1)), 1), heads * width)
            best = order(probs[:, t].flatten())[:budget].tolist()
        for h in range(heads):
            kept = []
            for j in range(int(n[t])):
                m = min(max(math.floor((j + 0.5) / int(n[t]) * width - 1e-4), 0), width - 1)
                if group == "batch":
                    some = (h * length + t) * width + m in chosen
                else:
                    some = h * width + m in best
                if some:
                    kept.append(j)
            one, two = gates[h, t].sigmoid()
            sparse = torch.zeros(v.shape[-1], dtype=q.dtype)
            if kept:
                p = torch.softmax(k[h, kept] @ q[h, t] / math.sqrt(q.shape[-1]), 0)
                sparse = one * (p @ v[h, kept])
            if causally:
                mean = v[h, : t + 1].mean(0)
            else:
                bins = bins_of(torch.arange(length), torch.tensor(length), width)
                mean = probs[h].mean(0)[bins] @ v[h]
            out[h, t] = two * sparse + (1 - two) * mean
    return out


@FORMS
@pytest.mark.parametrize("length", [1, 2, 33, 50])
def test_the_output_is_the_sheets_steps_by_hand(form, length):
    q, k, v = tensors(length, batch=1)
    method = built(form=form, k=4)
    gates = []
    encode = method.estimator.encoder.forward

    def watched(*args):
        image, found = encode(*args)
        gates.append(found)
        return image, found

    method.estimator.encoder.forward = watched
    method.trace = []
    out, lse = method(q, k, v, context(form))
    expected = by_hand(
        method, q[0], k[0], v[0], method.trace[0].scores[0], gates[0][0], form == "causal"
    )
    torch.testing.assert_close(out[0], expected, atol=1e-10, rtol=1e-10)
    assert lse.isnan().all()


@FORMS
def test_oracle_7_gradients_with_the_mask_held_fixed(form):
    q, k, v = (x.requires_grad_() for x in tensors(9, batch=1, heads=2, kv=1, dim=4, value=4))
    method = built(2, 1, 4, 4, form=form, width=8, k=3)
    keep = {}
    choose = method._keep

    def frozen(estimate, seen, real):
        return keep.setdefault("it", choose(estimate, seen, real))

    method._keep = frozen
    run = lambda q, k, v: method(q, k, v, context(form)).out  # noqa: E731
    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)
    method(q, k, v, context(form)).out.square().sum().backward()
    gates = method.estimator.encoder.gates.weight
    assert gates.grad.abs().max() > 0


@FORMS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_read_and_a_row_alone_is_the_same(form, side):
    q, k, v = tensors(41)
    pads = torch.tensor([0, 12])
    at = torch.arange(41)[None] - pads[:, None] if side == "left" else None
    mask = padding(41 - pads)
    mask = causal() & mask if form == "causal" else mask
    method = built(form=form)
    out = method(q, k, v, Context(mask=mask, q_positions=at, kv_positions=at)).out
    real = slice(12, None) if side == "left" else slice(0, 29)
    alone = method(*(x[1:, :, real] for x in (q, k, v)), context(form)).out
    torch.testing.assert_close(out[1:, :, real], alone, atol=1e-10, rtol=1e-10)
    assert out.isfinite().all()


@FORMS
@pytest.mark.parametrize(("dtype", "band"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_low_precision_on_the_same_mask(form, dtype, band):
    q, k, v = tensors(50, dtype=dtype)
    method = built(form=form, dtype=dtype)
    kept = []
    choose = method._keep
    method._keep = lambda *args: kept.append(choose(*args)) or kept[-1]
    out = method(q, k, v, context(form)).out
    assert out.dtype == dtype
    wide = method.double()
    wide._keep = lambda *args: kept[0]
    expected = wide(q.double(), k.double(), v.double(), context(form)).out
    torch.testing.assert_close(out.double(), expected, atol=band, rtol=band)


@pytest.mark.parametrize("group", ["head", "query", "batch"])
def test_bidirectional_groups_keep_k_on_average(group):
    q, k, v = tensors(128, batch=1)
    found = []
    ctx = Context(stats=lambda layout, **_: found.append(layout))
    built(form="bidirectional", group=group, k=16, width=32)(q, k, v, ctx)
    assert found[0].pairs / 128 == pytest.approx(16, rel=0.02)


def test_the_average_can_be_normalised():
    q, k, v = tensors(64, batch=1)
    v = torch.ones_like(v)
    for normalise, total in ((True, 1.0), (False, 64 / 16)):
        method = built(form="bidirectional", normalise_average=normalise)
        method.trace = []
        method(q, k, v, Context())
        mean = method._weighted_mean(method.trace[0].scores, v)
        torch.testing.assert_close(mean, torch.full_like(mean, total))


def test_value_heads_may_be_of_another_width():
    q, k, v = tensors(20, value=24)
    assert built(value=24)(q, k, v, CAUSAL).out.shape == (2, 4, 20, 24)


# -- decoding --------------------------------------------------------------------------------------
def layer(dtype=torch.float64, **fields):
    torch.manual_seed(1)
    spec = SEA(**({"k": 6, "width": 16, "divisor": 1.0, "max_length": 256} | fields))
    made = foveate.Attention(64, 4, "gqa(kv_heads=2)", spec, position="none").to(dtype).eval()
    if made.attention.lora is not None:
        for one in made.attention.lora.up.values():
            torch.nn.init.normal_(one.weight, std=0.1)
    return made


@pytest.mark.parametrize("cuts", [(70,), (1,) * 70, (3, 1, 1, 30, 35), (50, 1, 19)])
@pytest.mark.parametrize("fields", [{}, {"lora": 4}, {"group": "query"}], ids=str)
def test_oracle_7_decoding_equals_the_full_forward(cuts, fields):
    made, x = layer(**fields), torch.randn(2, 70, 64, dtype=torch.float64)
    want = made(x, mask=causal()).y
    cache = made.new_cache()
    with torch.no_grad():
        found = [made(part, mask=causal(), cache=cache).y for part in x.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(found, 1), want, atol=1e-10, rtol=1e-10)
    assert isinstance(cache, StateCache)


def test_oracle_7_decoding_in_fp32_is_within_1e_4():
    made, x = layer(torch.float32), torch.randn(1, 100, 64)
    want = made(x, mask=causal()).y
    cache = made.new_cache()
    with torch.no_grad():
        found = [made(part, mask=causal(), cache=cache).y for part in x.split(1, 1)]
    # A bin at the edge of the choice may fall on either side: not in these draws.
    torch.testing.assert_close(torch.cat(found, 1), want, atol=1e-4, rtol=1e-4)


def test_decoding_with_left_padding_and_beams():
    made, x = layer(), torch.randn(2, 43, 64, dtype=torch.float64)
    pads = torch.tensor([0, 9])
    at = torch.arange(43) - pads[:, None]

    def ctx(start, stop):
        mask = causal() & padding(stop - pads)
        return Context(
            mask=mask, q_positions=at[:, start:stop], kv_positions=at[:, :stop]
        )  # fmt: skip

    want = made(x, ctx=ctx(0, 43)).y
    cache = made.new_cache()
    with torch.no_grad():
        first = made(x[:, :20], ctx=ctx(0, 20), cache=cache).y
        rest = [made(x[:, t : t + 1], ctx=ctx(t, t + 1), cache=cache).y for t in range(20, 40)]
        found = torch.cat([first, *rest], 1)
        torch.testing.assert_close(found[0], want[0, :40], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(found[1, 9:], want[1, 9:40], atol=1e-10, rtol=1e-10)
        beams = torch.tensor([1, 0, 1])
        cache.reorder(beams)
        pads, at, x = pads[beams], at[beams], x[beams]
        last = made(x[:, 40:], ctx=ctx(40, 43), cache=cache).y
    torch.testing.assert_close(last, want[beams, 40:], atol=1e-10, rtol=1e-10)


def test_the_state_grows_by_keys_and_values_alone():
    made = layer()
    cache = made.new_cache()
    with torch.no_grad():
        made(torch.randn(1, 30, 64, dtype=torch.float64), mask=causal(), cache=cache)
        before = cache.bytes()
        made(torch.randn(1, 5, 64, dtype=torch.float64), mask=causal(), cache=cache)
    assert cache.elements_per_token == 2 * 16 * 2
    assert cache.bytes() - before == 5 * cache.elements_per_token * 8


# -- distillation ----------------------------------------------------------------------------------
def traced(method, q, k, v, ctx):
    method.trace = []
    method(q, k, v, ctx)
    return method.trace[0]


@FORMS
def test_losses_are_the_sheets_formulas(form):
    q, k, v = tensors(24, batch=1)
    trace = traced(built(form=form), q, k, v, context(form))
    tq, tk, _ = tensors(24, batch=1)
    goal_out = torch.randn_like(trace.out)
    found = layer_losses(trace, Teacher(tq, tk, goal_out, 0.25))
    mask = causal().dense(24, 24) if form == "causal" else torch.ones(24, 24).bool()
    goal = (tq @ tk.repeat_interleave(2, 1).mT / 4).masked_fill(~mask, -torch.inf).softmax(-1)
    n = torch.arange(1, 25) if form == "causal" else torch.full((24,), 24)
    index = bins_of(torch.arange(24), n[:, None], 16).expand(1, 4, -1, -1)
    own = {
        "est": trace.scores.gather(3, index),
        "dense": q @ k.repeat_interleave(2, 1).mT / 4,
    }
    for name, scores in own.items():
        log = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
        terms = torch.where(mask, goal * (goal.log() - log), 0.0)
        kl = terms.sum() / (96 if form == "causal" else 24)
        mse = (log.exp() - goal).square().mean()
        torch.testing.assert_close(found[name], 0.1 * kl + mse)
    context_loss = (trace.out - goal_out).square().mean().to(found["ctx"].dtype)
    torch.testing.assert_close(found["ctx"], context_loss, atol=1e-6, rtol=1e-5)
    alone = layer_losses(trace, Teacher(tq, tk, goal_out, 0.25), dense=False)
    assert set(alone) == {"est", "ctx"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_leave_padding_out(side):
    q, k, v = tensors(30)
    pads = torch.tensor([0, 8])
    at = torch.arange(30)[None] - pads[:, None] if side == "left" else None
    ctx = Context(mask=causal() & padding(30 - pads), q_positions=at, kv_positions=at)
    method = built()
    teacher = [*tensors(30)[:2], torch.randn(2, 4, 30, 16, dtype=torch.float64)]
    both = layer_losses(traced(method, q, k, v, ctx), Teacher(*teacher, 0.25))
    real = slice(8, None) if side == "left" else slice(0, 22)
    found = []
    for b, part in ((0, slice(None)), (1, real)):
        row = [x[b : b + 1, :, part] for x in (q, k, v, *teacher)]
        trace = traced(method, *row[:3], CAUSAL)
        found.append(layer_losses(trace, Teacher(*row[3:], 0.25))["ctx"])
    torch.testing.assert_close(both["ctx"], (found[0] * 30 + found[1] * 22) / 52)
    assert all(loss.isfinite() for loss in both.values())


def test_some_rows_stand_for_all():
    q, k, v = tensors(64, batch=1)
    trace = traced(built(), q, k, v, CAUSAL)
    teacher = Teacher(*tensors(64, batch=1)[:2], trace.out, 0.25)
    whole = layer_losses(trace, teacher)["est"]
    parts = [layer_losses(trace, teacher, rows=torch.arange(r, 64, 4))["est"] for r in range(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_training_jitters_some_calls_and_redraws_its_features():
    method = built(redraw=3, dtype=torch.float32).train()
    q, k, v = tensors(20, batch=1, dtype=torch.float32)
    ctx = Context(mask=causal(), phase="train")
    before = method.estimator.w.clone()
    method.trace = []
    for _ in range(2):
        method(q, k, v, ctx)
    assert torch.equal(method.estimator.w, before)
    for _ in range(98):
        method(q, k, v, ctx)
    assert not torch.equal(method.estimator.w, before)
    jittered = [t for t in method.trace if t.jitter is not None]
    assert 2 <= len(jittered) <= 25
    assert all(t.jitter.abs().max() <= 0.75 for t in jittered)


def test_jittered_layouts_are_the_jittered_map():
    jitter = (torch.rand(90, dtype=torch.float64) * 2 - 1) * 0.75
    probs = torch.rand(1, 2, 90, 16)
    seen = torch.arange(1, 91)[None]
    keep = keep_best(probs, budgets(5, seen, 16, 2, "causal_batch", 90), "causal_batch")
    layout = layout_of(keep, Stretch(seen, torch.zeros(1).long(), 90, jitter))
    index = bins_of(torch.arange(90), seen[0, :, None], 16, jitter)
    assert torch.equal(layout.dense(), keep.gather(3, index.expand(1, 2, -1, -1)).tril())


# -- refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "at least 1"),
        ({"width": 30}, "multiple of 4"),
        ({"divisor": 0.0}, "above 0"),
        ({"group": "row"}, "expected query"),
        ({"group": "batch"}, "see the future"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        SEA(**fields)


def test_calls_without_a_meaning_are_refused():
    q, k, v = tensors(20)
    method = built(max_length=30)
    with pytest.raises(InputError, match="own queries"):
        method(q[:, :, -1:], k, v, CAUSAL)
    with pytest.raises(InputError, match="whole rows"):
        method(q, k, v, Context(mask=foveate.window(3, 0)))
    with pytest.raises(InputError, match="built for causal"):
        method(q, k, v, Context())
    with pytest.raises(InputError, match="max_length"):
        method(*tensors(40), CAUSAL)
    with pytest.raises(InputError, match="softcap"):
        method(q, k, v, Context(mask=causal(), softcap=3.0))
    with pytest.raises(InputError, match="input"):
        built(lora=2)(q, k, v, CAUSAL)
    both = foveate.Attention(64, 4, attention=SEA(causal=False, width=16))
    with pytest.raises(InputError, match="no cache"):
        both(torch.randn(1, 3, 64), cache=both.new_cache())


def test_the_text_form_makes_a_recipe():
    assert make("sea(k=6, width=24)") == SEA(k=6, width=24)
