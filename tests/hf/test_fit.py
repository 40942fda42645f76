"""`foveate fit`: on a small model, cut off and gone on with, found by `use`, kept with weights."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import tiny
from transformers import AutoModelForCausalLM

import foveate
from foveate.hf import ModelError
from foveate.hf.fit.artefacts import ArtefactError, Shelf, fingerprint, load, place, save
from foveate.hf.fit.frozen import FrozenModel
from foveate.hf.fit.job import FileState
from foveate.hf.fit.texts import TextBatches
from foveate.methods import make
from foveate.methods.dhsa import fit as dhsa_fit
from foveate.ops.errors import InputError
from foveate.parts.fitting import Artefact, fitter_of


class Bytes:
    """A tokenizer of 97 tokens."""

    def __call__(self, text, **options):
        return type("Ids", (), {"input_ids": [ord(c) % 97 for c in text]})()


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dhsa_fit, "STEPS", 6)


def batches(length=160, size=2):
    random = torch.Generator().manual_seed(1)
    words = torch.randint(97, (40, 6), generator=random)
    text = words[torch.randint(40, (2000,), generator=random)].flatten()
    return TextBatches(Bytes(), text, length, size, judged=1)


def fit(model, key="dhsa", progress=lambda share, doing: None, name="dhsa"):
    frozen = FrozenModel(model)
    path = place(frozen.fingerprint, name)
    state = FileState(path.with_suffix(".fit"), frozen.fingerprint, name)
    made = fitter_of(make(key))(make(key), frozen, batches(), progress, state)
    save(made, frozen.fingerprint, path)
    return made, state


# -- the contract --------------------------------------------------------------------------------
def test_use_says_how_to_make_what_is_missing_and_finds_it_afterwards():
    model = tiny("llama")
    ids = torch.randint(97, (1, 200))
    with pytest.raises(ModelError, match="foveate fit MODEL --method dhsa"):
        foveate.use(model, "dhsa")
    assert not hasattr(model.config._attn_implementation, "before")
    fit(model)
    settings = "budget=48, block=16, local=16, sinks=8, instruction=8"
    with torch.no_grad():
        dense = model(ids).logits
        with foveate.use(model, f"dhsa({settings})"):
            sparse = model(ids).logits
        with foveate.use(model, "dhsa(budget=256)"):
            whole = model(ids).logits
    torch.testing.assert_close(whole, dense, atol=1e-4, rtol=1e-4)
    assert float((sparse - dense).abs().max()) > 1e-3


def test_the_predictor_learns_and_the_weights_of_the_model_stay():
    model = tiny("llama")
    before = fingerprint(model), model.model.embed_tokens.weight.clone()
    made, _ = fit(model)
    losses = [entry["loss"] for entry in made.facts["history"]]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert set(made.facts["held_out"]) == {"precision", "recall", "f1", "rate"}
    assert fingerprint(model) == before[0]
    assert torch.equal(model.model.embed_tokens.weight, before[1])


def test_a_fit_that_was_cut_off_ends_with_the_same_weights(monkeypatch):
    whole, _ = fit(tiny("llama"))
    monkeypatch.setenv("FOVEATE_CACHE", str(place("x", "x").parent / "elsewhere"))

    def killed(share, doing):
        if share > 0.6:
            raise KeyboardInterrupt

    monkeypatch.setattr(dhsa_fit.loop, "__kwdefaults__", {"every": 2, "setting": None})
    with pytest.raises(KeyboardInterrupt):
        fit(tiny("llama"), progress=killed)
    shares = []
    again, _ = fit(tiny("llama"), progress=lambda share, doing: shares.append(share))
    assert shares[0] > 0.6
    for name, tensor in whole.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name


def test_labels_are_those_of_the_models_own_attention():
    from foveate.methods.dhsa.labels import labels, positions

    model = tiny("llama")
    ids = torch.randint(97, (1, 70))
    watcher = dhsa_fit.Watcher((1,), 4)
    FrozenModel(model).run(ids, watcher)
    eager = model(ids, output_attentions=True).attentions[1][0].mean(0).double()
    found = torch.ones(70)
    for i in positions(70, 4).tolist():
        past, future = eager[i + 5 :, i - 3 : i + 1].sum(), eager[i + 5 :, i + 1 : i + 5].sum()
        found[i] = max(past, future) / min(past, future)
    x, y = watcher.seen[1]
    near = (found - 2).abs() < 1e-3
    assert torch.equal(y[0][~near], labels(found)[~near])
    assert x.shape == (1, 70, 32)
    assert 0 < y.sum() < 70


def test_generation_after_a_fit_goes_on_from_the_chunks_of_the_prompt():
    model = tiny("llama")
    fit(model)
    ids = torch.randint(97, (2, 120))
    with foveate.use(model, "dhsa(budget=256)"):
        ours = model.generate(ids, max_new_tokens=8, do_sample=False)
    theirs = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, theirs)
    with foveate.use(model, "dhsa(budget=48, block=16, local=16, sinks=8, instruction=8)"):
        beams = model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=2)
    assert beams.shape == (2, 128)


# -- artefacts -----------------------------------------------------------------------------------
def test_artefacts_go_with_the_model(tmp_path, monkeypatch):
    model = tiny("llama")
    fit(model)
    folder = tmp_path / "saved"
    with foveate.use(model, "dhsa(budget=64, block=16, local=16, sinks=8)") as used:
        used.save_pretrained(folder)
    assert (folder / "foveate-dhsa.safetensors").is_file()
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "another machine"))
    again = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(97, (1, 150))
    with foveate.use(again), torch.no_grad():
        assert again(ids).logits.isfinite().all()
    with foveate.use(again, "dhsa", fitted=folder), torch.no_grad():
        assert again(ids).logits.isfinite().all()


def test_an_artefact_of_another_model_is_refused(tmp_path):
    made, _ = fit(tiny("llama"))
    path = save(made, fingerprint(tiny("llama")), tmp_path / "it.safetensors")
    with pytest.raises(ArtefactError, match="on this model"):
        foveate.use(tiny("llama", seed=1), "dhsa", fitted=path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ArtefactError, match="can't be read"):
        foveate.use(tiny("llama"), "dhsa", fitted=path)
    with pytest.raises(ModelError, match="no artefact at"):
        foveate.use(tiny("llama"), "dhsa", fitted=tmp_path)


def test_fingerprints_know_weights_and_not_their_dtype():
    model = tiny("llama")
    one = fingerprint(model)
    assert fingerprint(tiny("llama")) == one
    assert fingerprint(tiny("llama").to(torch.bfloat16)) == one
    assert fingerprint(tiny("llama", seed=1)) != one
    assert fingerprint(tiny("qwen3")) != one


def test_artefacts_are_read_as_they_were_written(tmp_path):
    facts = {"a": [1, 2.5], "b": {"c": "text"}}
    some = Artefact("dhsa", facts, {"w": torch.randn(3, 2)})
    path = save(some, "f" * 64, tmp_path / "x.safetensors")
    found, made_on = load(path)
    assert (found.key, found.facts, made_on) == ("dhsa", facts, "f" * 64)
    assert torch.equal(found.tensors["w"], some.tensors["w"])
    plain = save(Artefact("dhsa", facts), "f" * 64, tmp_path / "x.json")
    assert load(plain)[0].facts == facts
    with pytest.raises(InputError, match=r"name it \.safetensors"):
        save(some, "f" * 64, tmp_path / "y.json")
    plain.write_text(json.dumps({"foveate": 99, "key": "dhsa", "model": "", "facts": {}}))
    with pytest.raises(ArtefactError, match="version 99"):
        load(plain)


def test_methods_that_learn_nothing_need_nothing():
    model = tiny("llama")
    full = make("full")
    assert Shelf(model).bind("full", full) is full
    with pytest.raises(InputError, match="learns nothing"):
        fitter_of(full)
    equal = make("dhsa(chunk=16)")
    assert Shelf(model).bind("dhsa", equal) is equal


# -- the text ------------------------------------------------------------------------------------
def test_batches_are_functions_of_their_number_and_disjoint_from_the_judges():
    made = batches()
    one, again = made.train(3), made.train(3)
    assert torch.equal(one.ids, again.ids)
    assert not torch.equal(one.ids, made.train(4).ids)
    assert one.task == ("prose", "retrieval")
    assert one.ids.shape == (2, 160)
    assert one.prompt[0] == 160
    answer = one.ids[1, one.prompt[1] :]
    assert torch.equal(one.scored[1].nonzero()[:, 0], torch.arange(one.prompt[1], 160))
    inside = one.ids[1, : one.prompt[1]].unfold(0, len(answer), 1)
    assert bool((inside == answer).all(1).any())  # the answer was hidden in the prompt
    assert int(one.scored[0].sum()) == 159


def test_text_that_is_too_short_is_refused():
    with pytest.raises(InputError, match="longer text"):
        TextBatches(Bytes(), torch.zeros(500, dtype=torch.int64), 160)
    with pytest.raises(InputError, match="64 tokens"):
        TextBatches(Bytes(), torch.zeros(5000, dtype=torch.int64), 32)


def test_loss_is_the_models_own():
    model = tiny("llama")
    frozen = FrozenModel(model)
    batch = batches().train(0)
    found = frozen.loss(frozen.run(batch.ids, make("full")), batch)
    wanted = batch.ids.masked_fill(~batch.scored, -100)
    for b in range(2):
        own = model(batch.ids[b : b + 1], labels=wanted[b : b + 1]).loss
        torch.testing.assert_close(found[b], own)
    assert all(not p.requires_grad for p in model.parameters())


def test_state_of_another_model_or_damaged_is_not_gone_on_with(tmp_path):
    state = FileState(tmp_path / "x.fit", "a" * 64, "dhsa")
    assert state.load() is None
    state.save({"n": 1}, {"w": torch.ones(2)})
    assert state.load()[0] == {"n": 1}
    assert FileState(tmp_path / "x.fit", "b" * 64, "dhsa").load() is None
    (tmp_path / "x.fit").write_bytes(b"broken")
    assert state.load() is None
    state.clear()
    assert not (tmp_path / "x.fit").exists()
