"""DR-RL: the oracles of its spec, and what a layer that changes its rank owes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import foveate
from foveate import Context, attention, causal, padding
from foveate.methods import make
from foveate.methods.drrl import DRRL
from foveate.methods.drrl.bounds import (
    output_bound,
    score_bound,
    sound_cost,
    spectral_norm,
    tail,
    tail_cost,
    weight_bound,
)
from foveate.methods.drrl.control import Decider, Spectra
from foveate.methods.drrl.costs import Shape, causal_flops, key_bytes, relative
from foveate.methods.drrl.lowrank import (
    Projected,
    energy,
    gram,
    grouped,
    grouped_gram,
    joint_maps,
    separate_left,
    spectrum,
)
from foveate.methods.drrl.policy import choose, masked, weight_features
from foveate.methods.drrl.reward import reinforce, reward, similarity
from foveate.ops.errors import InputError

FIXED = "drrl(control='fixed', rank={}, form='whole')"


def qkv(n=40, d=16, heads=2, kv_heads=2, batch=2, seed=0, dtype=torch.float32, decay=True):
    random = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, n, d), (batch, kv_heads, n, d), (batch, kv_heads, n, d))
    q, k, v = (torch.randn(s, generator=random, dtype=torch.float64) for s in shapes)
    if decay:  # singular values that fall
        fall = 0.7 ** torch.arange(d)
        turn = torch.linalg.qr(torch.randn(d, d, generator=random, dtype=torch.float64)).Q
        q, k = q * fall @ turn * 3, k * fall @ turn * 3
    return q.to(dtype), k.to(dtype), v.to(dtype)


def cut(x, r):
    """X_r by torch's own svd."""
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    return u[..., :r] * s[..., None, :r] @ vt[..., :r, :]


def layer(text, dim=32, heads=2, seed=0, **more):
    torch.manual_seed(seed)
    return foveate.Attention(dim, heads, attention=text, **more).eval()


SMALL = "r_min=2, r_max=16, step=2, segment=8"


# -- oracles of the spec --------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["whole", "causal"])
@pytest.mark.parametrize("basis", ["separate", "joint"])
def test_oracle_1_full_rank_is_sdpa(form, basis):
    q, k, v = qkv(60)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    at = Context(mask=causal())
    method = DRRL(control="fixed", rank=16, form=form, basis=basis, segment=16)
    torch.testing.assert_close(method(q, k, v, at).out, want, atol=1e-5, rtol=0)
    low = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    q, k = q[..., :5] @ low.T, k[..., :5] @ low.T  # of rank 5
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    got = replace(method, rank=5)(q, k, v, at).out
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    poor = replace(method, rank=3)(q, k, v, at).out
    assert (poor - want).abs().max() > 1e-3


@pytest.mark.parametrize("svd", ["gram", "full", "partial"])
@pytest.mark.parametrize("heads", [2, 4])
def test_oracle_2_factors_are_the_dense_product(svd, heads):
    q, k, _ = qkv(heads=heads)
    for r in (1, 5, 8, 15):
        wq, wk = spectrum(q, svd, r).w, spectrum(k, svd, r).w
        got = separate_left(q, wq, wk, r) @ (k @ wk[..., :r]).mT.repeat_interleave(heads // 2, 1)
        want = cut(q, r) @ cut(k, r).repeat_interleave(heads // 2, 1).mT
        torch.testing.assert_close(got.double(), want, atol=1e-5 * float(want.abs().max()), rtol=0)


def test_oracle_3_tails_and_energies():
    sigma = torch.tensor([4.0, 2.0, 1.0])
    step = tail(sigma, torch.tensor(1), torch.tensor(3))
    assert float(step) == pytest.approx(math.sqrt(5), rel=1e-6)
    got = energy(sigma, torch.tensor([1, 2, 3]))
    torch.testing.assert_close(got, torch.tensor([16 / 21, 20 / 21, 1.0]))
    x = qkv(dtype=torch.float64)[0]
    s = spectrum(x).sigma
    for one, two in ((1, 3), (8, 2), (5, 5), (0, 16), (4, 99)):
        want = (cut(x, one) - cut(x, two)).norm(dim=(-2, -1))
        got = tail(s, torch.tensor(one), torch.tensor(two))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_oracle_4_sound_bounds_hold_on_1000_draws():
    torch.manual_seed(0)
    n, d = 40, 16
    q, k, v = torch.randn(3, 1000, n, d, dtype=torch.float64) * 3
    fall = torch.rand(1000, 1, 1, dtype=torch.float64) * 0.6 + 0.4
    q, k = (x * fall ** torch.arange(d) for x in (q, k))
    one, two = torch.randint(1, 17, (2, 1000))
    change, norm, moved = [], [], []
    for x in (q, k):
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        keep = [torch.arange(d) < r[:, None] for r in (one, two)]
        a, b = (u * (s * m)[:, None] @ vt for m in keep)
        moved.append((a, b))
        change.append(tail(spectrum(x).sigma, one, two))
        norm.append(spectrum(x).sigma[:, 0])
    (qa, qb), (ka, kb) = moved
    sa, sb = qa @ ka.mT / d**0.5, qb @ kb.mT / d**0.5
    slack = 1 + 1e-9
    ds = (sa - sb).norm(dim=(1, 2))
    bound = score_bound(change[0], change[1], norm[0], norm[1], d)
    assert (ds <= bound * slack + 1e-9).all()
    da = (sa.softmax(-1) - sb.softmax(-1)).norm(dim=(1, 2))
    assert (da <= weight_bound(ds) * slack + 1e-9).all()
    do = ((sa.softmax(-1) - sb.softmax(-1)) @ v).norm(dim=(1, 2))
    norm_v = torch.linalg.matrix_norm(v, 2)
    assert (do <= output_bound(da, norm_v) * slack).all()
    assert (ds / bound.clamp_min(1e-12)).max() > 0.1  # it isn't empty


def test_oracle_5_power_iteration_underestimates():
    torch.manual_seed(0)
    x = torch.randn(40, 64, 32, dtype=torch.float64)
    true = torch.linalg.matrix_norm(x, 2)
    found = spectral_norm(x, 3, generator=torch.Generator().manual_seed(1))
    assert (found <= true * (1 + 1e-12)).all()
    assert (found < 0.98 * true).any()
    exact = spectral_norm(x, tolerance=1e-9)
    torch.testing.assert_close(exact, true, rtol=1e-4, atol=0)
    assert (spectral_norm(x, 3, safety=1.5) >= true).all()


def test_oracle_6_separate_truncation_is_never_better_than_the_best():
    worse = []
    for seed in range(20):
        q, k, _ = qkv(seed=seed, dtype=torch.float64)
        s = q @ k.mT / 4
        maps = joint_maps(grouped_gram(q, 2), gram(k))
        for r in (2, 8, 12):
            joint = (q @ maps.left[..., :r]) @ (k @ maps.right[..., :r]).mT / 4
            zq, rq = torch.linalg.qr(q)  # the spec's way: SVD of the d x d core
            zk, rk = torch.linalg.qr(k)
            best = zq @ cut(rq @ rk.mT, r) @ zk.mT / 4
            torch.testing.assert_close(joint, best, atol=1e-6, rtol=1e-6)
            apart = cut(q, r) @ cut(k, r).mT / 4
            gap = (apart - s).norm(dim=(2, 3)) / (best - s).norm(dim=(2, 3))
            assert (gap > 1 - 1e-6).all()
            worse.append(gap)
    assert torch.stack(worse).mean() > 1.05


def test_oracle_7_error_falls_with_the_rank():
    q, k, v = qkv(dtype=torch.float64)
    s = q @ k.mT / 4
    maps = joint_maps(grouped_gram(q, 2), gram(k))
    joint = torch.stack([
        ((q @ maps.left[..., :r]) @ (k @ maps.right[..., :r]).mT / 4 - s).norm(dim=(2, 3))
        for r in range(1, 17)
    ])  # fmt: skip
    assert (joint.diff(dim=0) < 0).all()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    errors = [(make(FIXED.format(r))(q, k, v).out - want).norm() for r in (2, 4, 8, 12, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9 < errors[0]


@pytest.mark.parametrize("control", ["policy", "energy", "fixed"])
@pytest.mark.parametrize("basis", ["separate", "joint"])
def test_oracle_8_the_causal_form_sees_no_later_token(control, basis):
    rank = ", rank=6" if control == "fixed" else ""
    made = layer(f"drrl(control={control!r}, basis={basis!r}, {SMALL}{rank})")
    x = torch.randn(2, 40, 32)
    for at in (9, 16, 30):
        other = x.clone()
        other[:, at] += 1
        before, after = made(x, mask=causal()).y, made(other, mask=causal()).y
        assert torch.equal(before[:, :at], after[:, :at])
        assert not torch.equal(before[:, at:], after[:, at:])


def test_oracle_8_the_whole_form_leaks_and_says_so():
    made = layer(f"drrl(control='fixed', rank=6, form='whole', {SMALL})")
    x = torch.randn(2, 40, 32)
    other = x.clone()
    other[:, 30] += 1
    before, after = made(x, mask=causal()).y, made(other, mask=causal()).y
    assert not torch.equal(before[:, :30], after[:, :30])
    from foveate import catalog

    assert "sees later tokens" in catalog.get("drrl").capabilities.causal_routing.note


@pytest.mark.parametrize("guard", ["tail", "sound"])
def test_oracle_9_the_guard(guard):
    q, k, _ = qkv()
    sq, sk = spectrum(q).sigma, spectrum(k).sigma
    spectra = Spectra([sq, sk], sq, sk, 40, True, False)
    current = torch.tensor([1, 3])

    def safe(eps):
        return Decider(DRRL(guard=guard, eps=eps, r_min=2, r_max=16, step=2), 0, 16).safe(
            spectra, current
        )

    frozen = torch.zeros(2, 8, dtype=torch.bool).scatter(1, current[:, None], True)
    assert torch.equal(safe(0.0), frozen)
    assert safe(math.inf).all()
    some = safe(0.1)
    assert some.any()
    assert not some.all()
    ranks, at = torch.arange(2, 17, 2), torch.tensor([4, 8])
    cost = tail_cost([sq, sk], at, ranks)
    want = (cut(k, 4) - cut(k, 2)).norm(dim=(2, 3)) / k.double().norm(dim=(2, 3))
    other = (cut(q, 4) - cut(q, 2)).norm(dim=(2, 3)) / q.double().norm(dim=(2, 3))
    assert float(cost[0, 0]) == pytest.approx(
        float(torch.stack((want[0], other[0])).max()), rel=1e-4
    )
    sound = sound_cost(sq, sk, at, ranks, 40, 16, cut_q=True)
    for b in range(2):  # it bounds what really happens
        r = int(at[b])
        a = [(cut(q[b], x) @ cut(k[b], x).mT / 4).softmax(-1) for x in (r, 2)]
        assert ((a[0] - a[1]).norm(dim=(1, 2)) / 40**0.5).max() <= sound[b, 0] * (1 + 1e-5)


def test_oracle_9_masked_actions_and_log_probabilities():
    torch.manual_seed(0)
    logits, safe = torch.randn(500, 7), torch.rand(500, 7) < 0.5
    safe[:, 0] = True
    p = masked(logits, safe).softmax(-1)
    assert p[~safe].max() < 1e-6
    found = choose(
        logits, safe, sample=True, explore=0.5, generator=torch.Generator().manual_seed(1)
    )
    assert safe.gather(1, found.action[:, None]).all()
    weights = logits.exp() * safe
    want = (weights.gather(1, found.action[:, None])[:, 0] / weights.sum(1)).log()
    torch.testing.assert_close(found.log_prob, want)
    best = choose(logits, safe, sample=False)
    assert torch.equal(best.action, logits.masked_fill(~safe, -torch.inf).argmax(1))
    assert len(found.action.unique()) == 7


def test_oracle_10_the_reward():
    got = reward(torch.tensor(0.98), torch.tensor(4.0), torch.tensor(0.5))
    assert float(got) == pytest.approx(0.73)
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(similarity(x, 2 * x), torch.ones(2))
    torch.testing.assert_close(similarity(x, -x), -torch.ones(2))
    torch.testing.assert_close(similarity(x, 2 * x, "log"), torch.ones(2), atol=0.05, rtol=0)


def test_oracle_11_reinforce_finds_the_best_arm():
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    logits = torch.zeros(7, requires_grad=True)
    means = torch.tensor([0.1, 0.3, 0.2, 0.5, 0.9, 0.4, 0.0])
    optimizer, baseline = torch.optim.SGD([logits], lr=0.2), 0.0
    for _ in range(2000):
        found = choose(logits[None], None, sample=True, generator=random)
        got = means[found.action] + 0.1 * torch.randn(1, generator=random)
        optimizer.zero_grad()
        reinforce(found.log_prob, got, baseline).backward()
        optimizer.step()
        baseline += 0.05 * (float(got) - baseline)
    assert logits.softmax(-1)[4] > 0.9


# -- what is ours: the causal form -----------------------------------------------------------------
def test_the_causal_form_by_hand():
    """Each segment on the eigenvectors of all keys before it, the first one at full rank."""
    q, k, v = qkv(30, heads=4, dtype=torch.float64)
    got = DRRL(control="fixed", rank=5, segment=8)(q, k, v, Context(mask=causal())).out
    want = attention(q, k, v, causal(), backend="reference").out.clone()
    for low in range(8, 30, 8):
        high = min(30, low + 8)
        w = torch.linalg.svd(k[:, :, :low], full_matrices=False)[2][:, :, :5].mT
        flat = (k[:, :, :high] @ w @ w.mT).repeat_interleave(2, 1)
        s = q[:, :, low:high] @ flat.mT / 4
        hidden = torch.arange(high) > torch.arange(low, high)[:, None]
        p = s.masked_fill(hidden, -torch.inf).softmax(-1)
        want[:, :, low:high] = p @ v[:, :, :high].repeat_interleave(2, 1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("text", [
    f"drrl({SMALL})",
    f"drrl(guard='sound', energies=True, {SMALL})",
    f"drrl(basis='joint', guard='sound', {SMALL})",
    f"drrl(previous='layer', refresh='doubling', {SMALL})",
    f"drrl(control='energy', tau=0.8, {SMALL})",
    "drrl(control='fixed', rank=5, segment=8)",
])  # fmt: skip
def test_decoding_equals_the_full_forward(text):
    made = layer(text, projection="gqa(kv_heads=1)")
    x = torch.randn(3, 37, 32)
    want = made(x, mask=causal()).y
    cache = made.new_cache()
    with torch.no_grad():
        parts = [made(p, mask=causal(), cache=cache).y for p in x.split((13, 1, 2, 8, 1, 9, 3), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-5, rtol=1e-5)
    cache.truncate(35)
    with torch.no_grad():
        again = made(x[:, 35:], mask=causal(), cache=cache).y
    torch.testing.assert_close(again, want[:, 35:], atol=1e-5, rtol=1e-5)
    if "fixed" not in text and "energy" not in text:
        with pytest.raises(InputError, match="truncate"):
            cache.truncate(30)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["causal", "whole"])
def test_padding_is_dropped_from_bases_and_decisions(side, form):
    made = layer(f"drrl(form={form!r}, {SMALL})")
    x = torch.randn(2, 30, 32)
    pads = torch.tensor([0, 5])
    at = torch.arange(30)[None]
    ctx = Context(mask=causal() & padding(30 - pads))
    cut_ = slice(0, 25)
    if side == "left":
        at = at - pads[:, None]
        ctx, cut_ = replace(ctx, q_positions=at, kv_positions=at), slice(5, 30)
    y = made(x, ctx=ctx).y
    torch.testing.assert_close(y[1:, cut_], made(x[1:, cut_], mask=causal()).y)
    torch.testing.assert_close(y[:1], made(x[:1], mask=causal()).y)


def test_decoding_a_padded_batch_with_beams():
    made = layer(f"drrl({SMALL})")
    x, pads = torch.randn(2, 30, 32), torch.tensor([0, 5])
    at = torch.arange(30)[None] - pads[:, None]

    def ctx(stop, start=0):
        return Context(
            mask=causal() & padding(stop - pads), q_positions=at[:, start:stop],
            kv_positions=at[:, :stop],
        )  # fmt: skip

    want = made(x, ctx=ctx(30)).y
    cache = made.new_cache()
    with torch.no_grad():
        got = [made(x[:, :12], ctx=ctx(12), cache=cache).y]
        for start, stop in ((12, 13), (13, 20), (20, 30)):
            got.append(made(x[:, start:stop], ctx=ctx(stop, start), cache=cache).y)
    got = torch.cat(got, 1)
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1, 5:], want[1, 5:], atol=1e-5, rtol=1e-5)
    one, two = made.new_cache(), made.new_cache()
    with torch.no_grad():
        for c in (one, two):
            made(x[:, :12], ctx=ctx(12), cache=c)
        one.reorder(torch.tensor([1, 0]))
        at = at[[1, 0]]
        pads = pads[[1, 0]]
        swapped = made(x[[1, 0], 12:20], ctx=ctx(20, 12), cache=one).y
    torch.testing.assert_close(swapped, got[[1, 0], 12:20], atol=1e-5, rtol=1e-5)


def test_low_precision_and_gradients():
    q, k, v = qkv(40, decay=False)
    method = DRRL(control="fixed", rank=6, segment=8)
    at = Context(mask=causal())
    want = method(q, k, v, at).out
    got = method(*(x.bfloat16() for x in (q, k, v)), at).out
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.06, rtol=0.06)
    q, k, v = (x[:1, :, :20].double().requires_grad_() for x in (q, k, v))
    weight = torch.randn_like(v)
    ours = torch.autograd.grad((method(q, k, v, at).out * weight).sum(), (q, k, v))
    bases = [torch.linalg.svd(k[:, :, :low].detach(), full_matrices=False)[2][:, :, :6].mT
             for low in (8, 16)]  # fmt: skip
    out = [attention(q[:, :, :8], k[:, :, :8], v[:, :, :8], causal(), backend="reference").out]
    for low, w in zip((8, 16), bases):  # bases are constants
        high = min(20, low + 8)
        out.append(attention(
            q[:, :, low:high] @ w, k[:, :, :high] @ w, v[:, :, :high], causal(), scale=0.25,
            backend="reference",
        ).out)  # fmt: skip
    theirs = torch.autograd.grad((torch.cat(out, 2) * weight).sum(), (q, k, v))
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two)


def test_mixed_ranks_in_a_batch_are_each_samples_own():
    made = layer(f"drrl(control='energy', tau=0.9, {SMALL})", position="none")
    x = torch.randn(4, 40, 32)
    x[:2] = x[:2, :, :1] * torch.randn(32) + 0.02 * x[:2]  # nearly of rank one
    both = made(x, mask=causal())
    alone = [made(x[b : b + 1], mask=causal()) for b in range(4)]
    torch.testing.assert_close(both.y, torch.cat([a.y for a in alone]), atol=1e-5, rtol=1e-5)
    ranks = [float(a.aux["drrl_rank"]) for a in alone]
    assert max(ranks[:2]) < min(ranks[2:])


def test_projections_are_continued_not_repeated():
    k = torch.randn(1, 2, 50, 16)
    basis = torch.linalg.qr(torch.randn(1, 2, 16, 16)).Q
    held = Projected(basis)
    torch.testing.assert_close(held.upto(k[:, :, :20], 4), k[:, :, :20] @ basis[..., :4])
    assert held.macs == 20 * 16 * 4
    torch.testing.assert_close(held.upto(k[:, :, :20], 6), k[:, :, :20] @ basis[..., :6])
    assert held.macs == 20 * 16 * 6  # the two new columns alone
    torch.testing.assert_close(held.upto(k[:, :, :30], 5), k[:, :, :30] @ basis[..., :5])
    assert held.macs == 30 * 16 * 6


def test_costs_by_counting():
    shape = Shape(64, 2, 1, 16, 16)
    assert shape.core(100) == 100 * 2 * 2 * 32
    assert shape.core(100, 8) / shape.core(100) == 0.75  # r = d/2 saves a quarter
    assert shape.core(100, 1) / shape.core(100) > 0.5
    found = causal_flops(shape, 32, 8, [16, 4, 4, 8], policy=True)
    pairs = [sum(range(low + 1, low + 9)) for low in (0, 8, 16, 24)]
    assert found["core"] == sum(2 * n * 2 * (r + 16) for n, r in zip(pairs, (16, 4, 4, 8)))
    keys = sum(2 * 16 * r * n for r, n in ((4, 16), (4, 24), (8, 32)))
    queries = sum(2 * 16 * r * 8 * 2 for r in (4, 4, 8))
    assert found["projections"] == keys + queries
    assert found["basis"] == 3 * (2 * 8 * 256 + 10 * 16**3)
    told = 5 * 64 * (2 * 16 + 1 * 32)  # of W_Q, W_K and W_V, once
    assert found["policy"] == 3 * (2 * 3 * 64 * 64 * 8 + 500_000) + told
    assert found["full"] == shape.core(32 * 33 // 2)
    less = causal_flops(shape, 32, 8, [16, 4, 4, 8], policy=False, doubling=True)
    assert less["projections"] < found["projections"]
    assert less["policy"] == 0
    assert relative(shape, 8, 32, 16) == 1.0
    assert key_bytes(shape, 100, 8, 4) == key_bytes(shape, 100, 16, 4) // 2


def test_weights_are_told_to_the_policy():
    made = layer(f"drrl({SMALL})")
    found = weight_features(made.projection.maps)
    w = made.projection.k.weight.detach()
    want = torch.stack((w.mean(), w.var(unbiased=False), w.norm()))
    torch.testing.assert_close(found[3:6], want)
    assert weight_features(()).shape == (9,)


def test_one_policy_serves_a_model_and_learns(tmp_path):
    pytest.importorskip("transformers")
    from foveate.models import FoveateConfig, FoveateForCausalLM

    torch.manual_seed(0)
    config = FoveateConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        attention=f"drrl(eps=10.0, {SMALL})",
    )  # fmt: skip
    model = FoveateForCausalLM(config)
    policies = [n for n, _ in model.named_parameters() if ".policy." in n]
    assert policies
    assert all(n.startswith("model.layers.0.") for n in policies)
    model.requires_grad_(False)
    policy = model.model.blocks[0].attention.attention.policy.requires_grad_(True)
    ids = torch.randint(1, 61, (2, 33))
    model.train()
    out = model(ids, labels=ids)
    out.loss.backward()
    assert {"drrl_loss"} < set(out.aux)
    assert policy.head[-1].weight.grad.abs().max() > 0
    assert int(policy.steps) == 1
    model.eval()
    model.generate(ids[:, :9], max_new_tokens=10, do_sample=False, pad_token_id=0)
    want = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path)
    again = FoveateForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids, use_cache=False).logits, want)
    alone = FoveateForCausalLM(replace_attention(config, f"drrl(shared=False, {SMALL})"))
    held = [n for n, _ in alone.named_parameters() if n.endswith("policy.conv.weight")]
    assert len(held) == 3


def replace_attention(config, text):
    from copy import deepcopy

    made = deepcopy(config)
    made.attention = text
    return made


def test_a_policy_learns_where_low_rank_costs_nothing():
    """Keys of rank 2: rewards differ by FLOPs alone, so that the lowest rank must win."""
    torch.manual_seed(0)
    made = layer(
        "drrl(r_min=2, r_max=14, step=4, segment=8, guard='none', beta=2.0, initial=-1, "
        "explore=0.3, explore_decay=0.95)",
        position="none",
    )
    with torch.no_grad():
        made.projection.k.weight.copy_(torch.randn(32, 2) @ torch.randn(2, 32) / 8)
    for p in made.projection.parameters():
        p.requires_grad_(False)
    made.train()
    optimizer = torch.optim.Adam(made.attention.policy.parameters(), lr=3e-3)
    for step in range(60):
        x = torch.randn(8, 32, 32, generator=torch.Generator().manual_seed(step))
        aux = made(x, mask=causal()).aux
        optimizer.zero_grad()
        aux["drrl_loss"].backward()
        optimizer.step()
    made.eval()
    assert float(made(torch.randn(8, 32, 32), mask=causal()).aux["drrl_rank"]) < 3


@pytest.mark.parametrize("options", [
    {"control": "rule"}, {"rank": 0}, {"tau": 0.0}, {"r_min": 70}, {"segment": 0}, {"initial": 9},
    {"eps": -1.0}, {"svd": "qr"},
])  # fmt: skip
def test_bad_hyper_parameters_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options)).replace("r_min", "r_max")):
        DRRL(**options)


def test_refusals():
    q, k, v = qkv(20)
    at = Context(mask=causal())
    rule = DRRL(control="energy", segment=8)
    with pytest.raises(InputError, match="network that is trained"):
        DRRL()(q, k, v, at)
    with pytest.raises(InputError, match='form="whole"'):
        rule(q, k, v, Context())
    with pytest.raises(InputError, match="bias"):
        rule(q, k, v, replace(at, bias=torch.zeros(1, 1, 20, 20)))
    with pytest.raises(InputError, match="causal mask or none"):
        rule(q, k, v, Context(mask=causal() & foveate.window(3, 0)))
    with pytest.raises(InputError, match="can't decode"):
        replace(rule, form="whole")(q[:, :, -1:], k, v, at)
    with pytest.raises(InputError, match="can't decode"):
        layer("drrl(form='whole')").new_cache()
    with pytest.raises(InputError, match="all tokens"):
        replace(rule, basis="joint")(q[:, :, -1:], k, v, at)
    with pytest.raises(InputError, match="holds"):
        layer(f"drrl({SMALL})", layer=2)(torch.randn(1, 20, 32), mask=causal())


def test_decoding_without_a_state_makes_bases_of_all_keys():
    q, k, v = qkv(37)
    for text in ("energy", "fixed"):
        method = DRRL(control=text, rank=5, r_min=2, r_max=16, step=2, segment=8)
        whole = method(q, k, v, Context(mask=causal())).out
        for new in (1, 3, 12):
            got = method(q[:, :, -new:], k, v, Context(mask=causal(), phase="decode")).out
            torch.testing.assert_close(got, whole[:, :, -new:], atol=1e-5, rtol=1e-5)
    alone = method(q[:, :, -1:], k, v, Context(phase="decode")).out
    torch.testing.assert_close(alone, whole[:, :, -1:], atol=1e-5, rtol=1e-5)


def test_grouped_maps_are_each_heads_own():
    q, k, _ = qkv(heads=4)
    w = spectrum(k).w
    got = grouped(q, w[..., :3], 2)
    for head in range(4):
        torch.testing.assert_close(got[:, head], q[:, head] @ w[:, head // 2, :, :3])


def test_a_padded_batch_generates_what_each_row_does_alone():
    pytest.importorskip("transformers")
    from foveate.models import FoveateConfig, FoveateForCausalLM

    torch.manual_seed(0)
    model = FoveateForCausalLM(
        FoveateConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            projection="gqa(kv_heads=2)", initializer_range=0.4, attention=f"drrl({SMALL})",
        )
    ).eval()  # fmt: skip
    rows = [torch.randint(1, 61, (1, n)) for n in (21, 8, 13)]
    ids = torch.cat([torch.nn.functional.pad(r, (21 - r.shape[1], 0)) for r in rows])
    mask = (ids > 0).long()
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    got = model.generate(ids, attention_mask=mask, **options)
    for b, row in enumerate(rows):
        want = model.generate(row, **options)[0]
        assert torch.equal(got[b, 21 - row.shape[1] :], want)
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **options)
    for b, row in enumerate(rows):
        want = model.generate(row, num_beams=3, **options)[0]
        assert torch.equal(beams[b, 21 - row.shape[1] :], want)


@pytest.mark.parametrize("form", ["causal", "whole"])
def test_nothing_in_nothing_out(form):
    method = DRRL(control="fixed", rank=4, form=form, segment=8)
    q, k, v = qkv(0)
    assert method(q, k, v, Context(mask=causal())).out.shape == v.shape
    q, k, v = (x[:0] for x in qkv(9))
    assert method(q, k, v, Context(mask=causal())).out.shape == v.shape


def test_the_whole_form_of_an_encoder_ignores_padding_behind():
    for basis in ("separate", "joint"):
        made = layer(f"drrl(form='whole', basis={basis!r}, control='energy', tau=0.9, {SMALL})",
                     projection="gqa(kv_heads=1)")  # fmt: skip
        x = torch.randn(2, 30, 32)
        y = made(x, mask=padding([30, 19])).y
        torch.testing.assert_close(y[1:, :19], made(x[1:, :19]).y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("previous", "want"),
    # A policy that always goes one rank up, from index 0, over four decisions in each layer.
    [("layer", [4.0, 6.0, 8.0]), ("segment", [7.0, 7.0, 7.0])],
)
def test_the_previous_action_is_the_layer_belows_or_the_segment_befores(previous, want):
    pytest.importorskip("transformers")
    from foveate.models import FoveateConfig, FoveateForCausalLM

    torch.manual_seed(0)
    text = f"drrl(guard='none', previous={previous!r}, {SMALL})"
    config = FoveateConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, attention=text
    )
    model = FoveateForCausalLM(config).eval()

    def up(x, weights, before, energies=None):
        return torch.nn.functional.one_hot((before + 1).clamp(max=7), 8).float()

    model.model.blocks[0].attention.attention.policy.forward = up
    ids = torch.randint(1, 61, (2, 40))
    out = model(ids, use_cache=False)
    ranks = [float(v) for n, v in out.aux.items() if n.endswith("drrl_rank")]
    assert ranks == want
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(p, past_key_values=cache).logits for p in ids.split((11, 1, 20, 8), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), out.logits, atol=1e-4, rtol=1e-4)


def test_layers_below_are_told_apart_by_both_ends_of_the_padding():
    """Rows that start together and end apart are decided apart: none takes another's rank."""
    pytest.importorskip("transformers")
    from foveate.models import FoveateConfig, FoveateForCausalLM

    torch.manual_seed(0)
    model = FoveateForCausalLM(
        FoveateConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
            initializer_range=0.4, attention=f"drrl(previous='layer', guard='none', {SMALL})",
        )
    ).eval()  # fmt: skip
    ids = torch.randint(1, 61, (3, 40))
    mask = torch.ones_like(ids)
    mask[1:, 30:] = 0
    got = model(ids, attention_mask=mask, use_cache=False).logits
    for b, end in enumerate((40, 30, 30)):
        want = model(ids[b : b + 1, :end], use_cache=False).logits
        torch.testing.assert_close(got[b : b + 1, :end], want, atol=1e-4, rtol=1e-4)


def test_a_partial_svd_knows_all_of_the_energy():
    x, ranks = torch.randn(2, 3, 50, 16), torch.tensor([2, 4])
    some, whole = spectrum(x, "partial", 4).sigma, spectrum(x).sigma
    torch.testing.assert_close(energy(some, ranks), energy(whole, ranks), atol=0.01, rtol=0)
    torch.testing.assert_close(some.norm(dim=-1), whole.norm(dim=-1))
    assert (some.diff(dim=-1) <= 1e-4).all()


def test_a_rule_decides_only_what_it_runs(monkeypatch):
    from foveate.methods.drrl import run

    made = []
    of_gram = run.of_gram
    monkeypatch.setattr(run, "of_gram", lambda g: (made.append(g), of_gram(g))[1])
    q, k, v = qkv(37)
    method = DRRL(control="energy", r_min=2, r_max=16, step=2, segment=8)
    at = Context(mask=causal())
    want = method(q, k, v, at).out
    assert len(made) == 4
    got = method(q[:, :, -1:], k, v, replace(at, phase="decode")).out
    assert len(made) == 5
    torch.testing.assert_close(got, want[:, :, -1:], atol=1e-5, rtol=1e-5)


def test_weights_are_read_only_where_a_rank_is_decided(monkeypatch):
    from foveate.methods.drrl import control

    told = []
    monkeypatch.setattr(
        control, "weight_features", lambda maps: (told.append(len(maps)), weight_features(maps))[1]
    )
    made = layer(f"drrl({SMALL})")
    made(torch.randn(2, 40, 32), mask=causal())
    assert told == [3]  # once for all segments
    cache = made.new_cache()
    with torch.no_grad():
        for length in (8, 1, 1, 6, 1):  # decisions at tokens 8 and 16
            made(torch.randn(2, length, 32), mask=causal(), cache=cache)
    assert told == [3, 3, 3]


def test_the_mean_rank_over_pairs():
    made = layer(f"drrl(guard='none', {SMALL})")

    def up(x, weights, before, energies=None):
        return torch.nn.functional.one_hot((before + 1).clamp(max=7), 8).float()

    made.attention.policy.forward = up
    aux = made(torch.randn(2, 37, 32), mask=causal()).aux
    ranks = torch.tensor([4.0, 6, 8, 10])
    allowed = torch.ones(37, 37).tril()
    pairs = torch.stack([rows.sum() for rows in allowed.split(8)[1:]])
    assert float(aux["drrl_rank"]) == 7
    torch.testing.assert_close(aux["drrl_rank_of_pairs"], (ranks * pairs).sum() / pairs.sum())


def test_cutting_back_a_row_that_is_all_padding_so_far():
    made = layer(f"drrl({SMALL})")
    x, cache = torch.randn(2, 12, 32), made.new_cache()
    pads = torch.tensor([0, 6])

    def put(start, stop):
        at = torch.arange(stop)[None] - pads[:, None]
        ctx = Context(
            mask=causal() & padding(stop - pads), q_positions=at[:, start:], kv_positions=at
        )
        with torch.no_grad():
            return made(x[:, start:stop], ctx=ctx, cache=cache).y

    put(0, 6)
    cache.truncate(4)
    pads = torch.tensor([0, 4])
    got = put(4, 9)
    torch.testing.assert_close(got[1:], made(x[1:, 4:9], mask=causal()).y, atol=1e-5, rtol=1e-5)


def test_the_miniatures_arms_are_met_at_the_policys_rank():
    papers = pytest.importorskip("foveate.papers.drrl")

    def bent(rank):  # a loss that falls ever more slowly
        return 64 / rank, float(rank)

    assert papers.at_rank(27.5, bent, 1) == pytest.approx(64 / 27.5, rel=1e-3)
    assert papers.at_rank(27.5, bent) > 1.01 * 64 / 27.5  # a coarse grid flatters the policy
    assert papers.at_rank(64.0, bent, 1) == 1.0
    points = [bent(8), bent(64), bent(24), bent(32)]
    assert papers.between(points, 28) == pytest.approx((64 / 24 + 2) / 2)
    assert papers.between(points, 8.0) == 8.0
    assert papers.between(points, 64.0) == 1.0


@pytest.mark.parametrize("previous", ["segment", "layer"])
def test_checkpointing_decides_and_learns_once(previous):
    pytest.importorskip("transformers")
    from foveate.models import FoveateConfig, FoveateForCausalLM

    def trained(**checkpoints):
        torch.manual_seed(0)
        text = (
            f"drrl(eps=3.0, eps_decay=0.5, explore=0.5, explore_decay=0.5, previous={previous!r}, "
            f"{SMALL})"
        )
        model = FoveateForCausalLM(
            FoveateConfig(
                vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                attention=text,
            )
        ).train()  # fmt: skip
        if checkpoints:
            model.gradient_checkpointing_enable(checkpoints)
        for step in range(2):
            ids = torch.randint(1, 61, (3, 33), generator=torch.Generator().manual_seed(step))
            model(ids, labels=ids).loss.backward()
        return model

    one, two = trained(), trained(use_reentrant=False)
    for p, (name, other) in zip(one.parameters(), two.named_parameters(), strict=True):
        assert (p.grad is None) == (other.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, other.grad, atol=1e-5, rtol=1e-4)
    for here, there in zip(one.buffers(), two.buffers(), strict=True):
        torch.testing.assert_close(here, there)
    with pytest.raises(InputError, match="use_reentrant=False"):
        trained(use_reentrant=True)


@pytest.mark.parametrize("basis", ["separate", "joint"])
def test_decompositions_are_all_counted(basis, monkeypatch):
    made = []
    for name, worth in (("eigh", 1), ("svd", 2)):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda x, real=real, worth=worth: (made.append(worth), real(x))[1]
        )
    q, k, v = qkv(16, kv_heads=1)
    DRRL(control="fixed", rank=4, basis=basis, segment=8)(q, k, v, Context(mask=causal()))
    counted = Shape(32, 2, 1, 16, 16).basis(0, queries=basis == "joint")
    assert counted == sum(made) * 10 * 16**3
