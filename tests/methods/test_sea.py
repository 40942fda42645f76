"""SEA's mask and estimator: the spec's oracles 1 to 6 and 8."""

from __future__ import annotations

import math

import pytest
import torch
from sea_models import CAUSAL, built, context, open_gates, tensors

import foveate
from foveate import Context, attention, causal
from foveate.methods import make
from foveate.methods.sea import SEA, performer
from foveate.methods.sea.compress import bins_of, budgets, firsts, keep_best
from foveate.methods.sea.estimator import Estimate, resized_identity
from foveate.methods.sea.layout import Stretch, layout_of
from foveate.ops.errors import InputError

FORMS = pytest.mark.parametrize("form", ["causal", "bidirectional"])


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
