"""The search on whole models, its artefact, and mixed text and vision tokens."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny

import foveate
from foveate.hf import Assignment
from foveate.hf.fit.artefacts import fingerprint
from foveate.hf.mminference import search
from foveate.methods.mminference import QBoundary

IMAGE = 90
PATCHES = 16
SMALL = (
    "a-shape(sinks=8, local=64)",
    "vertical-slash(verticals=40, slashes=50, forced_verticals=4, forced_slashes=50)",
    "grid(max_stride=16, horizontal=False)",
)


def vlm(seed=0):
    """A small Llava: a CLIP tower of 4 x 4 patches and a Llama, random weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    torch.manual_seed(seed)
    sight = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8, projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=sight, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    model = Llava(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.3)
    model.set_attn_implementation("eager")
    return model


def prompt(images=6):
    """Text, an image, text, an image, ...: ids and pixels of one prompt."""
    torch.manual_seed(7)
    ids = []
    for _ in range(images):
        ids += torch.randint(0, 90, (9,)).tolist() + [IMAGE] * PATCHES
    ids += torch.randint(0, 90, (12,)).tolist()
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.randn(images, 3, 32, 32)}


def language(model, text):
    """The pattern on the language model's layers, everything else full."""
    names = {
        f"{s.stack}.{s.layer}" for s in foveate.hf.sites(model).values() if "vision" not in s.name
    }
    return Assignment(dict.fromkeys(sorted(names), text))


@torch.no_grad()
def test_dense_boundaries_leave_a_vision_language_model_as_it_is():
    model, inputs = vlm(), prompt()
    eager = model(**inputs).logits
    for text in (
        "full",
        "q-boundary(patterns=['full', 'full'])",
        "2d-boundary(patterns=[['full', 'grid(stride=1)'], ['full']])",
    ):
        with foveate.use(model, language(model, text)):
            torch.testing.assert_close(model(**inputs).logits, eager, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_modalities_reach_the_patterns(monkeypatch):
    model, inputs = vlm(), prompt()
    seen = []
    real = QBoundary.layout

    def spy(self, q, k, v, ctx):
        seen.append(ctx.modality)
        return real(self, q, k, v, ctx)

    monkeypatch.setattr(QBoundary, "layout", spy)
    eager = model(**inputs).logits
    narrow = "q-boundary(patterns=['full', 'a-shape(sinks=0, local=1)'])"
    with foveate.use(model, language(model, narrow)):
        changed = model(**inputs).logits
    kinds = (inputs["input_ids"] == IMAGE).long()
    assert len(seen) == 2
    assert all(torch.equal(one, kinds) for one in seen)
    first = int(kinds[0].argmax())
    torch.testing.assert_close(changed[:, :first], eager[:, :first], atol=1e-4, rtol=1e-4)
    assert (changed[:, -1] - eager[:, -1]).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, eager)  # undone, hooks too


@torch.no_grad()
def test_generation_after_a_sparse_prefill():
    model, inputs = vlm(), prompt()
    with foveate.use(model, language(model, "q-boundary(patterns=['full', 'full'])")):
        ours = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours, model.generate(**inputs, max_new_tokens=5, do_sample=False))


def test_search_makes_an_artefact_that_use_takes(tmp_path):
    model = tiny("llama")
    ids = torch.randint(3, 97, (1, 300))
    told = []
    found = search(
        model, [ids, ids.flip(1)], lambda *given: told.append(given), candidates=SMALL,
        target=(8, 60),
    )  # fmt: skip
    assert told[-1][0] == 1.0
    assert [share for share, _ in told] == sorted(share for share, _ in told)
    assert found["fingerprint"] == fingerprint(model) != fingerprint(tiny("llama", seed=1))
    assert set(found["layers"]) == {"0", "1", "2"}
    for heads in found["search"]["heads"].values():
        assert all(one["area"] <= 1.02 * one["target"] for one in heads.values())
    path = tmp_path / "mminference.json"
    path.write_text(json.dumps(found))
    with torch.no_grad(), foveate.use(model, path) as run:
        assert run.sites
        sparse = model(ids).logits
    assert sparse.isfinite().all()
    assert search(model, [ids], candidates=SMALL, target=(8, 60)) == search(
        model, [ids], candidates=SMALL, target=(8, 60)
    )


def test_search_at_a_full_budget_is_dense(tmp_path):
    model = tiny("llama")
    ids = torch.randint(3, 97, (1, 200))
    found = search(model, [ids], candidates=("a-shape(sinks=8, local=64)",), target=(1, 200))
    path = tmp_path / "mminference.json"
    path.write_text(json.dumps(found))
    with torch.no_grad():
        eager = model(ids).logits
        with foveate.use(model, path):
            torch.testing.assert_close(model(ids).logits, eager, atol=1e-4, rtol=1e-4)


def test_search_on_a_vision_language_model(tmp_path):
    model, inputs = vlm(), prompt()
    found = search(model, [inputs], candidates=SMALL, target=(8, 40))
    assert len(found["layers"]) == 2
    assert all("language_model" in name for name in found["layers"])
    path = tmp_path / "mminference.json"
    path.write_text(json.dumps(found))
    with torch.no_grad(), foveate.use(model, path):
        assert model(**inputs).logits.isfinite().all()


def test_search_needs_a_prompt():
    with pytest.raises(foveate.hf.ModelError, match="at least one prompt"):
        search(tiny("llama"), [])
