"""Flux on a transformers model: routers are fitted, the backbone isn't touched, `use` routes."""

import pytest
import torch

pytest.importorskip("transformers")

from test_fit import batches
from tiny_models import tiny

import foveate
from foveate.hf.fit.artefacts import load, place, save
from foveate.hf.fit.frozen import FrozenModel
from foveate.hf.fit.job import FileState
from foveate.methods import make
from foveate.methods.flux import fit as flux_fit
from foveate.methods.flux.train import Mixing
from foveate.ops.errors import InputError
from foveate.parts import Attention
from foveate.parts.fitting import fitter_of

METHOD = "flux(sinks=16, local=32, block=16, pool=16)"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(flux_fit, "STEPS", 4)


def fit(model, progress=lambda share, doing: None):
    frozen = FrozenModel(model)
    path = place(frozen.fingerprint, "flux")
    state = FileState(path.with_suffix(".fit"), frozen.fingerprint, "flux")
    made = fitter_of(make(METHOD))(make(METHOD), frozen, batches(), progress, state)
    save(made, frozen.fingerprint, path)
    return made, path


# -- oracle 8 ------------------------------------------------------------------------------------
def test_8_gradients_reach_the_routers_only():
    model = tiny("llama")
    frozen = FrozenModel(model)
    learnt = flux_fit.Learnt(frozen.layers, frozen.head_dim)
    for router in learnt.routers.by_layer.values():
        router.head[-1].weight.data.normal_()  # so that the gradient goes past it
    batch = batches().train(0)
    mixing = Mixing(make(METHOD), learnt.routers, batch.prompt)
    frozen.loss(frozen.run(batch.ids, mixing), batch).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    for name, p in learnt.routers.named_parameters():
        assert p.grad is not None, name
        assert float(p.grad.abs().sum()) > 0, name


def test_routers_are_fitted_reloaded_and_decide():
    model = tiny("llama")
    ids = torch.randint(97, (2, 200))
    with torch.no_grad():
        dense = model(ids).logits
    made, path = fit(model)
    assert set(made.facts["held_out"]) == {
        "dense_prose", "dense_retrieval", "full_prose", "full_retrieval", "loss_prose",
        "loss_retrieval",
    }  # fmt: skip
    assert made.facts["held_out"]["full_prose"] == 1.0  # four steps from almost surely full
    assert set(made.facts["history"][0]) == {"loss", "full_prose", "full_retrieval", "seconds"}
    again, _ = load(path)
    for name, tensor in made.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
    with foveate.use(model, METHOD), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense, atol=1e-4, rtol=1e-4)
    # The same routers with the middle layer turned to sparse.
    again.tensors["by_layer.1.head.4.bias"].copy_(torch.tensor([9.0, 0.0]))
    save(again, FrozenModel(model).fingerprint, path)
    parts = foveate.hf.Assignment({1: METHOD.replace("pool", "route='sparse', pool")})
    with foveate.use(model, METHOD), torch.no_grad():
        routed = model(ids).logits
    with foveate.use(model, parts), torch.no_grad():
        forced = model(ids).logits
    torch.testing.assert_close(routed, forced)
    assert float((routed - dense).abs().max()) > 1e-3
    with foveate.use(model, METHOD):
        ours = model.generate(ids, max_new_tokens=6, do_sample=False)
        beams = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=2)
    with foveate.use(model, parts):
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), ours)
    assert beams.shape == (2, 206)


def test_a_fit_begins_at_the_mean_and_spread_of_the_first_prompts(monkeypatch):
    monkeypatch.setattr(flux_fit, "STEPS", 0)
    monkeypatch.setattr(flux_fit, "FIRST", 3)
    made, _ = fit(tiny("llama"))
    frozen = FrozenModel(tiny("llama"))
    routers, seen = make(METHOD).with_artefact(made).routers, []
    for number in range(3):
        batch = batches().train(number)
        mixing = Mixing(make(METHOD), flux_fit.Learnt(frozen.layers, 16).routers, batch.prompt)
        frozen.run(batch.ids, mixing)
        seen.append(mixing.u)
    torch.manual_seed(0)
    plain = flux_fit.Learnt(frozen.layers, 16).routers
    for layer in frozen.layers:
        u = torch.cat([pooled[layer] for pooled in seen])
        scaled = (u - u.mean(0)) / (u - u.mean(0)).square().mean().sqrt()
        x, wanted = (r.by_layer[str(layer)].encoder[0] for r in (routers, plain))
        torch.testing.assert_close(x(u), wanted(scaled), atol=1e-4, rtol=1e-4)


def test_a_fit_that_was_cut_off_ends_with_the_same_routers(tmp_path, monkeypatch):
    whole, _ = fit(tiny("llama"))
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "elsewhere"))
    plain = flux_fit.loop
    monkeypatch.setattr(flux_fit, "loop", lambda *a, **more: plain(*a, **more | {"every": 1}))

    def killed(share, doing):
        if share >= 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tiny("llama"), killed)
    shares = []
    again, _ = fit(tiny("llama"), lambda share, doing: shares.append(share))
    assert shares == [0.75, 1.0]
    for name, tensor in whole.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name


class Sees(Attention):
    """Dense, and keeps what the first layer's queries were before their rotation."""

    wants_query_rope = True

    def __init__(self):
        self.raw = None

    def __call__(self, q, k, v, ctx=None):
        if ctx.layer == 0:
            rope, positions = ctx.query_rope
            self.raw = rope.unrotate(q, positions)
        return make("full")(q, k, v, ctx)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("left", [0, 13])
def test_queries_are_told_as_they_were_before_their_rotation(family, left):
    model, seen = tiny(family), Sees()
    ids = torch.randint(97, (1, 40))
    mask = (torch.arange(40) >= left).long()[None]
    caught = []
    layer = model.model.layers[0].self_attn
    place_ = getattr(layer, "q_norm", layer.q_proj)
    handle = place_.register_forward_hook(lambda m, a, out: caught.append(out))
    positions = (torch.arange(40) - left).clamp_min(0)[None]
    with foveate.use(model, seen), torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions)
    handle.remove()
    wanted = caught[-1]
    if wanted.shape != (1, 4, 40, 16):  # gemma3 transposes first
        wanted = wanted.reshape(1, 40, 4, 16).transpose(1, 2)
    torch.testing.assert_close(seen.raw, wanted, atol=1e-4, rtol=1e-4)


def test_a_fit_that_could_learn_nothing_is_refused():
    model = FrozenModel(tiny("llama"))
    for text, said in (
        ("flux", "greater --length"),
        ("flux(route='full')", "no routers to fit"),
        ("flux(mode='triangle')", "mode='streaming'"),
    ):
        with pytest.raises(InputError, match=said):
            flux_fit.fit(make(text), model, batches(), print, None)
