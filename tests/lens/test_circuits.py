"""Circuits and composition: the oracles of the talking-heads spec, on maps and on models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from foveate.lens.circuits import Factored, Heads
from foveate.lens.composition import (
    KINDS,
    channels,
    component_scores,
    read_by,
    score_of,
    standardised,
    whole_scores,
)
from foveate.lens.reading import Reading, gain_of
from foveate.ops.errors import InputError
from foveate.parts.rope import Rope


def heads(layers=3, per=2, dim=24, width=5, wide=6, ropes=None, scale=1.0) -> Heads:
    count = layers * per
    maps = [
        torch.randn(count, *shape, dtype=torch.float64) * scale
        for shape in ((dim, width), (dim, width), (dim, wide), (wide, dim))
    ]
    return Heads(
        *maps,
        torch.arange(layers).repeat_interleave(per),
        torch.arange(per).repeat(layers),
        ropes or {},
    )


@pytest.mark.parametrize("dim", [40, 7])  # 7: the product has a rank below its inner size
def test_oracle_1_the_cheap_svd_is_that_of_the_explicit_product(dim):
    left, right = torch.randn(3, dim, 9).double(), torch.randn(3, 9, dim).double()
    u, s, v = Factored(left, right).svd()
    for n in range(3):
        product = left[n].numpy() @ right[n].numpy()
        want_u, want_s, want_vh = np.linalg.svd(product)
        rank = len(s[n])
        np.testing.assert_allclose(s[n].numpy(), want_s[:rank], atol=1e-5)
        for i in range(rank):
            written = np.outer(v[n, :, i], v[n, :, i])
            np.testing.assert_allclose(written, np.outer(want_vh[i], want_vh[i]), atol=1e-4)
            read = np.outer(u[n, :, i], u[n, :, i])
            np.testing.assert_allclose(read, np.outer(want_u[:, i], want_u[:, i]), atol=1e-4)
        summed = sum(s[n, i] * torch.outer(u[n, :, i], v[n, :, i]) for i in range(rank))
        np.testing.assert_allclose(summed.numpy(), product, atol=1e-9)
    dense = torch.linalg.matrix_norm(left @ right)
    torch.testing.assert_close(Factored(left, right).norm(), dense)
    x = torch.randn(4, dim).double()
    mine = (x @ Factored(left, right).compact()).norm(dim=-1)
    torch.testing.assert_close(mine, (x @ left @ right).norm(dim=-1))


def dense_score(a, b):
    return float((a @ b).norm() / (a.norm() * b.norm()))


def by_hand(h: Heads, a: int, b: int, kind: str) -> float:
    ov_a, qk_b = h.v[a] @ h.o[a], h.q[b] @ h.k[b].T
    return dense_score(ov_a, {"q": qk_b, "k": qk_b.T, "v": h.v[b] @ h.o[b]}[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_2_whole_scores_are_the_root_mean_square_of_components(kind):
    h = heads()
    spectrum = h.ov().svd()
    whole, scores = whole_scores(h, kind), component_scores(spectrum, h, kind)
    weight = spectrum.s.square() / spectrum.s.square().sum(1, keepdim=True)
    summed = (weight[:, :, None] * scores.square()).sum(1).sqrt()
    seen = 0
    for a in range(len(h)):
        for b in range(len(h)):
            if h.layer[a] >= h.layer[b]:
                assert math.isnan(whole[a, b])
                assert scores[a, :, b].isnan().all()
                continue
            seen += 1
            assert float(whole[a, b]) == pytest.approx(by_hand(h, a, b, kind), abs=1e-9)
            assert float(whole[a, b]) == pytest.approx(float(summed[a, b]), abs=1e-6)
    assert seen == 12
    there = scores[~scores.isnan()]
    assert float(there.min()) >= 0
    assert float(there.max()) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_2_scores_dont_depend_on_scale_basis_or_gauge(kind):
    h = heads()
    scores, whole = component_scores(h.ov().svd(), h, kind), whole_scores(h, kind)
    basis = torch.linalg.qr(torch.randn(24, 24).double()).Q
    g, f = torch.randn(6, 6, 6).double(), torch.randn(6, 5, 5).double()
    changed = {
        "scaled": (3 * h.q, 0.2 * h.k, 7 * h.v, 0.5 * h.o),
        "turned": (basis.T @ h.q, basis.T @ h.k, basis.T @ h.v, h.o @ basis),
        "gauged": (h.q @ f, h.k @ f.inverse().mT, h.v @ g, g.inverse() @ h.o),
    }
    for maps in changed.values():
        other = Heads(*maps, h.layer, h.head)
        found = component_scores(other.ov().svd(), other, kind)
        torch.testing.assert_close(found, scores, equal_nan=True, atol=1e-7, rtol=0)
        torch.testing.assert_close(
            whole_scores(other, kind), whole, equal_nan=True, atol=1e-7, rtol=0
        )


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_3_a_planted_channel_is_found(kind):
    """Head 0.0 writes along v, head 1.1 reads v alone: CS 1, and 0 for all that is orthogonal."""
    dim, wide = 24, 6
    h = heads(2, 2, dim)
    basis = torch.linalg.qr(torch.randn(dim, dim).double()).Q
    v, w = basis[:, 0], torch.randn(dim).double()
    h.o[0] = torch.diag(torch.arange(wide, 0, -1).double()) @ basis[:, :wide].T
    h.v[0] = torch.linalg.qr(torch.randn(dim, wide).double()).Q
    planted, rest = torch.zeros(dim, 5).double(), torch.zeros(dim, 5).double()
    planted[:, 2], rest[:, 2] = 3.0 * v, w
    if kind == "v":
        h.v[3], h.o[3] = torch.zeros(dim, wide).double(), torch.randn(wide, dim).double()
        h.v[3][:, 1] = v
    else:
        h.q[3], h.k[3] = (planted, rest) if kind == "q" else (rest, planted)
    spectrum = h.ov().svd()
    assert spectrum.s[0].tolist() == pytest.approx([6, 5, 4, 3, 2, 1])
    assert abs(float(spectrum.v[0, :, 0] @ v)) == pytest.approx(1)
    assert abs(float(spectrum.u[0, :, 0] @ v)) < 0.9  # the side that is read is another one
    scores = component_scores(spectrum, h, kind)[0, :, 3]
    assert scores.tolist() == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-12)
    other = {"q": "k", "k": "q", "v": "q"}[kind]
    assert component_scores(spectrum, h, other)[0, 0, 3] < 0.9
    best = channels(h, spectrum, kind, top=1)[0]
    assert (best.early, best.component, best.late) == ((0, 0), 0, (1, 1))
    assert best.score == pytest.approx(1)
    assert best.effect == pytest.approx(6)
    assert best.text == "0.0[0] -> 1.1 " + {"q": "query", "k": "key", "v": "value"}[kind]


@pytest.mark.parametrize("dim", [64, 768])
def test_oracle_4_random_directions_have_the_score_of_chance(dim):
    into = Factored(torch.randn(dim, 64).double(), torch.randn(64, dim).double())
    v = torch.nn.functional.normalize(torch.randn(20_000, dim).double(), dim=1)
    assert float(score_of(v, into).square().mean()) == pytest.approx(1 / dim, rel=0.03)


def test_z_compares_components_of_all_earlier_heads():
    h = heads()
    scores = component_scores(h.ov().svd(), h, "k")
    z = standardised(scores)
    column = scores[:4, :, 5].flatten().numpy()
    want = (column - column.mean()) / column.std()
    np.testing.assert_allclose(z[:4, :, 5].flatten().numpy(), want, atol=1e-9)
    assert z[4:, :, 5].isnan().all()
    only = channels(h, h.ov().svd(), "k", into=[(1, 0)], top=3)
    assert [one.late for one in only] == [(1, 0)] * 3
    assert only[0].z >= only[1].z >= only[2].z
    assert {one.early[0] for one in only} == {0}
    ranks = whole_scores(h, "k")[:2, 2]
    assert only[0].whole_rank == 1 + int(ranks[1 - only[0].early[1]] > ranks[only[0].early[1]])
    with pytest.raises(InputError, match=r"no head 5\.0.*layers are 0 to 2"):
        channels(h, h.ov().svd(), "k", into=[(5, 0)])
    with pytest.raises(InputError, match="kind='o'"):
        read_by(h, "o")


def test_rotary_qk_scores_tokens_that_stand_apart():
    """x_q QK(delta) x_k^T is the product of the rotated query and key, delta tokens apart."""
    rope = Rope.of(4)
    h = heads(1, 2, ropes={0: rope})
    x, y = torch.randn(2, 24).double()
    for delta in (0, 3):
        q = rope.rotate((x @ h.q[1])[None, None, None], torch.tensor([11]))
        k = rope.rotate((y @ h.k[1])[None, None, None], torch.tensor([11 - delta]))
        want = float((q * k).sum())
        assert float(x @ h.qk(delta).dense()[1] @ y) == pytest.approx(want)
    torch.testing.assert_close(h.qk(0).dense(), h.qk().dense())
    assert not torch.allclose(h.qk(3).dense(), h.qk().dense())


def test_heads_of_other_shapes_are_refused():
    h = heads()
    with pytest.raises(InputError, match=r"expected q and k \(N, D, d\)"):
        Heads(h.q, h.k[:, :, :3], h.v, h.o, h.layer, h.head)
    with pytest.raises(InputError, match="offset=-1"):
        Reading(offset=-1)


def llama(**more):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def neox():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config).eval()


def ours():
    pytest.importorskip("transformers")
    from foveate.models import FoveateConfig, FoveateForCausalLM

    config = FoveateConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        projection="gqa(kv_heads=2)",
    )  # fmt: skip
    return FoveateForCausalLM(config).eval()


MODELS = {"llama": llama, "gpt2": gpt2, "neox": neox, "ours": ours}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_heads_that_are_read_are_what_the_model_runs(make):
    """Scores and outputs of every head of layer 1, from the normed input and the maps alone."""
    from foveate.lens.reading import places
    from foveate.lens.watching import watched

    model = make()
    for name, p in model.named_parameters():
        if "norm" in name or "ln_" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5) if name.endswith("weight") else None
    h = Reading(fold=True, centre=True)(model)
    place = places(model)[1]
    seen = {}
    hooks = [
        place.norm.register_forward_pre_hook(lambda m, given: seen.update(x=given[0])),
        place.out.module.register_forward_hook(lambda m, given, out: seen.update(y=out)),
    ]
    ids = torch.randint(64, (2, 9))
    with torch.no_grad(), watched(model) as watch:
        model(ids)
        probs = watch.weights(1).double()
    for hook in hooks:
        hook.remove()
    x = seen["x"].detach().double()
    centres = isinstance(place.norm, torch.nn.LayerNorm)
    x = x - x.mean(-1, keepdim=True) if centres else x
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    mine = [h.at(1, n) for n in range(4)]
    d = h.q.shape[-1]
    scores = torch.zeros(2, 4, 9, 9, dtype=torch.float64)
    for delta in range(9):
        qk = Heads(h.q, h.k, h.v, h.o, h.layer, h.head, h.ropes).qk(delta).dense()[mine]
        whole = torch.einsum("bid,hde,bje->bhij", x, qk, x) / math.sqrt(d)
        apart = torch.arange(9)[:, None] - torch.arange(9) == delta
        scores = torch.where(apart, whole, scores)
    causal = torch.ones(9, 9).tril().bool()
    weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
    torch.testing.assert_close(weights, probs, atol=1e-4, rtol=0)
    outs = torch.einsum("bhij,bjd,hde->bie", weights, x, h.ov().dense()[mine])
    want = seen["y"].detach().double()
    want = want - want.mean(-1, keepdim=True) if centres else want
    torch.testing.assert_close(outs, want, atol=1e-4, rtol=1e-3)


def test_a_norms_gain_is_found_by_trying_it():
    layer, rms = torch.nn.LayerNorm(31), torch.nn.RMSNorm(30)
    for norm in (layer, rms):
        torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(layer.bias)
    gain, centres = gain_of(layer, 31)
    torch.testing.assert_close(gain, layer.weight.detach().double(), atol=1e-5, rtol=1e-4)
    assert centres
    gain, centres = gain_of(rms, 30)
    torch.testing.assert_close(gain, rms.weight.detach().double(), atol=1e-5, rtol=1e-4)
    assert not centres


def test_models_that_have_no_circuits_are_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(InputError, match="no QK circuit"):
        Reading()(transformers.Qwen3ForCausalLM(config))
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(InputError, match="no OV circuit"):
        Reading()(transformers.Gemma2ForCausalLM(config))
    with pytest.raises(InputError, match="residual stream"):
        Reading()(transformers.GraniteForCausalLM(transformers.GraniteConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, residual_multiplier=0.5)))  # fmt: skip
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    for name, said in (
        ("BitNet", "attn_sub_norm"),  # a norm between the mixed values and W_O
        ("DiffLlama", "groupnorm"),
        ("HunYuanDenseV1", "no QK circuit"),
    ):
        made = getattr(transformers, f"{name}Config")(**sizes, head_dim=8)
        with pytest.raises(InputError, match=said):
            Reading()(getattr(transformers, f"{name}ForCausalLM")(made))
    scaled = transformers.FalconH1Config(**sizes, attention_out_multiplier=0.5)
    with pytest.raises(InputError, match="residual stream"):
        Reading()(transformers.FalconH1ForCausalLM(scaled))
    shared = transformers.GPTBigCodeConfig(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64
    )
    with pytest.raises(InputError, match="unknown order"):
        Reading()(transformers.GPTBigCodeForCausalLM(shared))
    with pytest.raises(InputError, match="no attention that can be read"):
        Reading()(torch.nn.Linear(3, 3))
    from foveate.models import FoveateConfig, FoveateForCausalLM

    config = FoveateConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, projection="mla(latent=16, rope_dim=4)"
    )
    with pytest.raises(InputError, match="can be sliced by head"):
        Reading()(FoveateForCausalLM(config))
