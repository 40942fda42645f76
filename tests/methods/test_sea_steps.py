"""SEA's outputs by hand, its gradients and its decoding: the spec's oracle 7."""

from __future__ import annotations

import math

import pytest
import torch
from sea_models import CAUSAL, built, context, tensors

import foveate
from foveate import Context, causal, padding
from foveate.methods.sea import SEA
from foveate.methods.sea.compress import bins_of, budgets
from foveate.parts import StateCache

FORMS = pytest.mark.parametrize("form", ["causal", "bidirectional"])


# -- outputs ---------------------------------------------------------------------------------------
def by_hand(method, q, k, v, scores, gates, causally):
    """Steps 7 to 11 of the spec for one sequence, element by element: (H, L, Dv)."""
    heads, length = q.shape[:2]
    k, v = (x.repeat_interleave(heads // len(k), 0) for x in (k, v))
    probs = scores.softmax(-1)

    def order(x):  # equal to 12 binary digits is equal
        digits = [round(m * 4096) / 4096 * 2**e for m, e in map(math.frexp, x.tolist())]
        return torch.tensor(sorted(range(len(digits)), key=lambda i: (-digits[i], i)))

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
