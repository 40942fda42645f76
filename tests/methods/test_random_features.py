"""Random-feature attention: the spec's oracles, the score type in layers, fit and targets."""

from __future__ import annotations

import math

import pytest
import torch

from foveate import Attention, Context, causal, padding, window
from foveate.methods import make
from foveate.methods.random_features import (
    RandomFeatureAttention,
    RandomFeatureMLP,
    RidgePath,
    arc_cosine,
    attention_kernel,
    complexity,
    excess_risk_bound,
    on_sphere,
    ridge,
    targets,
)
from foveate.methods.random_features.targets import average, between, correlated, of_query
from foveate.ops.errors import InputError

F64 = torch.float64
D, N, M = 5, 7, 30


def model_of(**more):
    made = RandomFeatureAttention(D, M, **more)
    torch.nn.init.normal_(made.values)
    return made.requires_grad_(False)


def by_loops(model, query, keys, activation=torch.relu):
    """f as the spec writes it, without its features' scale."""
    v = model.values.view(model.heads, -1) * len(model.values) ** -0.5
    one = torch.ones(1, dtype=F64)
    out = []
    for x0, xs in zip(query, keys):
        q, total = torch.cat((x0, one)), 0.0
        for m in range(model.heads):
            for x in xs:
                k = torch.cat((x, one))
                total = total + activation(q @ model.weight[m] @ k) * (v[m] @ k) / len(xs)
        out.append(total)
    return torch.stack(out)[:, None]


# -- the spec's oracles ---------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_oracle_1_scores_are_standard_normal_around_the_bias(bias):
    (x0,), ((x,),) = on_sphere(1, 1, 4)
    w = RandomFeatureAttention(4, 100_000, bias).weight
    one = torch.ones(1, dtype=F64)
    scores = torch.einsum("a,mab,b->m", torch.cat((x0, one)), w, torch.cat((x, one)))
    assert scores.mean().item() == pytest.approx(bias * (x0 @ x).item(), abs=0.02)
    assert scores.var().item() == pytest.approx(1.0, abs=0.02)
    neurons = RandomFeatureMLP(4, 3, 100_000).weight
    row = torch.cat((*on_sphere(1, 3, 4)[1][0], x0, one))
    assert (row @ neurons).var().item() == pytest.approx(1.0, abs=0.02)


def test_oracle_2_order_and_copies_of_keys_do_not_count_but_to_the_mlp():
    query, keys = on_sphere(6, N, D)
    f = model_of(bias=1.0)
    order = torch.randperm(N)
    torch.testing.assert_close(f(query, keys[:, order]), f(query, keys), atol=1e-12, rtol=0)
    twice = torch.cat((keys, keys), 1)
    torch.testing.assert_close(f(query, twice), f(query, keys), atol=1e-12, rtol=0)
    mlp = RandomFeatureMLP(D, N, 50)
    torch.nn.init.normal_(mlp.values)
    assert not torch.allclose(mlp(query, keys[:, order]), mlp(query, keys), atol=1e-3)


@pytest.mark.parametrize("n", [40, 400])
def test_oracle_3_linear_in_v_and_the_fit_solves_the_normal_equations(n):
    query, keys = on_sphere(n, N, D)
    f = model_of(outputs=2)
    one, two = torch.randn(2, *f.values.shape, dtype=F64)
    outs = []
    for v in (one, two, 2 * one - 3 * two):
        f.values.copy_(v)
        outs.append(f(query, keys))
    torch.testing.assert_close(outs[2], 2 * outs[0] - 3 * outs[1])
    y, penalty = torch.randn(n, 2, dtype=F64), 1e-3
    phi = f.features(query, keys)
    v = ridge(phi, y, penalty)
    assert (phi.T @ (phi @ v - y) + penalty * n * v).abs().max() < 1e-8
    dual, primal = (ridge(phi, y, penalty, form) for form in ("dual", "primal"))
    torch.testing.assert_close(dual, primal, atol=1e-6, rtol=1e-6)
    f.fit(query, keys, y, penalty)
    torch.testing.assert_close(f.values.data, primal, atol=1e-6, rtol=1e-6)
    new, theirs = on_sphere(9, N, D)
    other = f.features(new, theirs)
    path = RidgePath(phi @ phi.T, y)
    for p in (1e-4, 1e-3):
        wanted = other @ ridge(phi, y, p)
        torch.testing.assert_close(path.predict(other @ phi.T, p), wanted, atol=1e-6, rtol=1e-6)


def test_oracle_4_homogeneous_in_w_and_linear_attention_without_the_relu():
    query, keys = on_sphere(6, N, D)
    f = model_of()
    before = f.features(query, keys)
    f.weight.mul_(3.0)
    torch.testing.assert_close(f.features(query, keys), 3.0 * before)
    g = model_of(activation="identity")
    one = torch.ones(6, 1, dtype=F64)
    q = torch.cat((query, one), 1)
    k = torch.cat((keys, one[:, None].expand(-1, N, -1)), 2)
    state = torch.einsum("nia,nib->nab", k, k) / N  # what a linear attention keeps of the keys
    v = g.values.view(M, D + 1) * len(g.values) ** -0.5
    wanted = torch.einsum("na,mab,nbc,mc->n", q, g.weight, state, v)[:, None]
    torch.testing.assert_close(g(query, keys), wanted, atol=1e-10, rtol=0)


def test_oracle_5_a_head_on_the_constant_is_mean_pooling():
    query, keys = on_sphere(6, N, D)
    f = RandomFeatureAttention(D, 1).requires_grad_(False)
    f.weight.zero_()
    f.weight[0, D, D] = 1.0
    torch.nn.init.normal_(f.values)
    v = f.values[:, 0] * (D + 1) ** -0.5
    wanted = keys.mean(1) @ v[:D] + v[D]
    torch.testing.assert_close(f(query, keys)[:, 0], wanted, atol=1e-14, rtol=0)


@pytest.mark.parametrize("length", [1, 3])
def test_oracle_6_features_tend_to_the_kernel_at_the_rate_of_the_heads(length):
    query, keys = on_sphere(12, length, 4)
    limit = attention_kernel(query, keys, query, keys)
    one = torch.ones(12, 1, dtype=F64)
    q = torch.cat((query, one), 1)
    k = torch.cat((keys, one[:, None].expand(-1, length, -1)), 2)
    rho = (q @ q.T)[:, None, :, None] * torch.einsum("aib,cjb->aicj", k, k) / 4
    kappa = (1 - rho**2).clamp_min(0).sqrt() + rho * (math.pi - rho.clamp(-1, 1).arccos())
    wanted = (kappa / (2 * math.pi) * torch.einsum("aib,cjb->aicj", k, k)).mean((1, 3))
    torch.testing.assert_close(limit, wanted)
    cut = attention_kernel(query, keys, query, keys, numbers=1)  # one example at a time
    torch.testing.assert_close(cut, limit)

    def error(heads):
        gaps = []
        for _ in range(4):
            phi = RandomFeatureAttention(4, heads).features(query, keys)
            gaps.append((5 * phi @ phi.T - limit).square().mean())
        return torch.stack(gaps).mean().sqrt().item()

    few, many = error(150), error(150 * 64)
    assert many < 2 / math.sqrt(150 * 64)  # O(1 / sqrt(M)); the limit's entries are up to 1
    assert 5 < few / many < 13  # 8 in expectation


# -- what else must hold ---------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_the_model_is_the_sheet_s_sum(bias):
    query, keys = on_sphere(3, 4, D)
    f = model_of(bias=bias)
    torch.testing.assert_close(f(query, keys), by_loops(f, query, keys))


def test_padding_is_left_out_whatever_it_holds():
    query, keys = on_sphere(3, N, D)
    f = model_of(bias=1.0)
    real = torch.arange(N) < torch.tensor([7, 3, 1])[:, None]
    found = f(query, keys.masked_fill(~real[..., None], math.nan), real)
    for i, n in enumerate((7, 3, 1)):
        torch.testing.assert_close(found[i : i + 1], f(query[i : i + 1], keys[i : i + 1, :n]))


def test_the_kernel_s_function():
    rho = torch.linspace(-1, 1, 5, dtype=F64)
    a, b = torch.randn(2, 1_000_000, dtype=F64)
    for r in rho.tolist():
        other = r * a + math.sqrt(1 - r * r) * b
        assert arc_cosine(torch.tensor(r)).item() == pytest.approx(
            (a.relu() * other.relu()).mean().item(), abs=3e-3
        )
    assert arc_cosine(rho)[-1].item() == pytest.approx(0.5)
    assert arc_cosine(rho)[2].item() == pytest.approx(1 / (2 * math.pi))


def test_features_in_fp32_are_fitted_in_float64():
    query, keys = on_sphere(300, 8, 8)
    f = RandomFeatureAttention(8, 60, dtype=torch.float32)
    y, penalty = torch.randn(300, 1), 1e-7
    phi = f.features(query, keys)
    assert phi.dtype == torch.float32
    v = ridge(phi, y, penalty)
    exact = phi.double()
    assert (exact.T @ (exact @ v - y) + penalty * 300 * v).abs().max() < 1e-8
    path = RidgePath(exact @ exact.T, y)
    torch.testing.assert_close(path.predict(exact @ exact.T, penalty), exact @ v)
    f.fit(query, keys, y, penalty)
    torch.testing.assert_close(f.values.data, v.float())


def test_no_examples_have_no_features():
    query, keys = on_sphere(3, N, D)
    assert model_of().features(query[:0], keys[:0]).shape == (0, M * (D + 1))


def test_the_best_ridge_is_chosen_for_each_output_alone():
    phi, other = torch.randn(60, 30, dtype=F64), torch.randn(200, 30, dtype=F64)
    v = torch.randn(30, 1, dtype=F64)
    y = torch.cat((phi @ v, torch.randn(60, 1, dtype=F64)), 1)  # one exact, one only noise
    path = RidgePath(phi @ phi.T, y)
    wanted = torch.cat((other @ v, torch.zeros(200, 1, dtype=F64)), 1)
    assert path.best(other @ phi.T, wanted, (1e-6, 1e2)) == [1e-6, 1e2]


def test_targets_are_their_formulas_and_their_norms_those_of_their_tensors():
    query, keys = on_sphere(4, N, D)
    b = torch.randn(D, dtype=F64)
    b = b / b.norm()
    names = ["<b,x0>^2", "mean <b,xi>^2", "mean <b,xi>^3", "mean <x0,xi>^1 <b,xi>^1",
             "mean <x0,xi>^2 <b,xi>^1", "mean <x0,xi>^3"]  # fmt: skip
    assert [t.name for t in targets(D)] == names
    x0, x = query[0], keys[0]
    wanted = [(x0 @ b) ** 2, ((x @ b) ** 2).mean(), ((x @ b) ** 3).mean(),
              ((x @ x0) * (x @ b)).mean(), ((x @ x0) ** 2 * (x @ b)).mean(),
              ((x @ x0) ** 3).mean()]  # fmt: skip
    found = [t.value(b, query, keys)[0] for t in targets(D)]
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted))
    # <x0, x> <b, x> = <x0 (x) x (x) x, I (x) b>
    tensor = torch.einsum("ab,c->abc", torch.eye(D, dtype=F64), b)
    assert correlated(1, 1, D).norms == {(1, 2): pytest.approx(tensor.square().sum().item())}
    half = between(average(2), correlated(1, 1, D), 0.25)
    mixed = 0.75 * found[1] + 0.25 * found[3]
    torch.testing.assert_close(half.value(b, query, keys)[0], mixed)
    assert half.norms == {(0, 2): 0.5625, (1, 2): 0.0625 * D}


def test_complexity_and_bound():
    assert complexity(of_query(1).norms) == 4.0  # C_1 = 1 * 4
    assert complexity({(0, 0): 3.0}) == 3.0  # C_0 = max(1, 0)
    assert complexity(average(2).norms) == pytest.approx(2**4.5 * 16)
    few = math.sqrt((math.log(16 * 1000) + math.log(20)) / 400)
    narrow = math.sqrt((256 + math.log(1000)) / (0.05 * 1000))
    assert excess_risk_bound(9.0, 400, 1000, 16) == pytest.approx(3 * (few + narrow))
    assert excess_risk_bound(9.0, 1600, 1000, 16) < excess_risk_bound(9.0, 400, 1000, 16)


def test_bad_input_is_refused():
    query, keys = on_sphere(3, N, D)
    for build, said in (
        (lambda: RandomFeatureAttention(0, 4), "at least 1"),
        (lambda: RandomFeatureAttention(3, 4, activation="gelu"), "identity"),
        (lambda: model_of()(query[:2], keys), r"\(n, 5\)"),
        (lambda: model_of()(query, keys, torch.zeros(3, N).bool()), "at least one real key"),
        (lambda: RandomFeatureMLP(D, N, 9)(query, keys[:, :3]), "7 keys"),
        (lambda: model_of().fit(query, keys, torch.zeros(3, 2), 1.0), "1 outputs"),
        (lambda: ridge(query, keys[0], 1.0), "outputs"),
        (lambda: ridge(query, query, 0.0), "above 0"),
        (lambda: RidgePath(query, query), "square"),
        (lambda: between(average(2), average(2), 0.5), "common degree"),
        (lambda: excess_risk_bound(1.0, 0, 5, 5), "sizes"),
        (lambda: complexity({(1, -1): 1.0}), "negative"),
    ):
        with pytest.raises(InputError, match=said):
            build()


# -- the score type, in layers ---------------------------------------------------------------------
def test_random_features_are_relu_mean_of_a_layer():
    query, keys = on_sphere(6, N, D)
    f = model_of(bias=1.0)
    one = torch.ones(6, 1, dtype=F64)
    q = torch.einsum("na,mab->nmb", torch.cat((query, one), 1), f.weight)[:, :, None]
    k = torch.cat((keys, one[:, None].expand(-1, N, -1)), 2)[:, None]
    out = make("relu-mean")(q, k, k, Context(scale=1.0)).out[:, :, 0]
    wanted = f.features(query, keys) * len(f.values) ** 0.5
    torch.testing.assert_close(out.flatten(1), wanted)


@pytest.mark.parametrize(
    "mask", [None, causal(), causal() & padding([300, 200]), causal() & window(9, 0)]
)
def test_relu_mean_is_its_formula_with_gradients(mask):
    shapes = (2, 4, 300, 8), (2, 2, 300, 8), (2, 2, 300, 6)
    q, k, v = (torch.randn(s, dtype=F64, requires_grad=True) for s in shapes)
    seen = torch.ones(1, 1, 300, 300).bool() if mask is None else mask.dense(300, 300)
    scores = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)).relu() * seen
    wanted = scores @ v.repeat_interleave(2, 1) / seen.sum(-1, keepdim=True).clamp_min(1)
    found = make("relu-mean")(q, k, v, Context(mask=mask))
    torch.testing.assert_close(found.out, wanted)
    assert found.lse.isnan().all()
    probe = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad((found.out * probe).sum(), (q, k, v)),
        torch.autograd.grad((wanted * probe).sum(), (q, k, v)),
    ):
        torch.testing.assert_close(one, other)
    low = make("relu-mean")(q.bfloat16(), k.bfloat16(), v.bfloat16(), Context(mask=mask)).out
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), wanted, atol=0.03, rtol=0.03)


def test_relu_mean_decodes_in_a_layer_as_it_trains():
    layer = Attention(32, 4, "gqa(kv_heads=2)", "relu-mean").double()
    x = torch.randn(2, 11, 32, dtype=F64)
    whole = layer(x, mask=causal()).y
    cache = layer.new_cache()
    with torch.no_grad():
        parts = [layer(x[:, :4], mask=causal(), cache=cache).y]
        parts += [layer(x[:, i : i + 1], mask=causal(), cache=cache).y for i in range(4, 11)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    whole.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    with pytest.raises(InputError, match="sink_logits"):
        layer(x, ctx=Context(sink_logits=torch.zeros(4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer.float()(x.float(), mask=causal()).y
    torch.testing.assert_close(out.double(), whole, atol=0.05, rtol=0.05)
