"""Chosen blocks in other people's models: MoBA's generation, VMoBA and Rectified on an image."""

from __future__ import annotations

import pytest
import torch

import foveate

transformers = pytest.importorskip("transformers")


def language_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=50, eos_token_id=None, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_sparse_decoding_with_a_cache_is_the_model_without_one(beams):
    model = language_model()
    ids = torch.randint(3, 50, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "num_beams": beams}
    full = model.generate(ids, **asked)
    with foveate.use(model, "moba(block=8, topk=2, decode='sparse')"):
        cached = model.generate(ids, **asked)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **asked))
    assert not torch.equal(cached, full)
    with foveate.use(model, "moba(block=8, topk=8, decode='sparse')"):
        assert torch.equal(model.generate(ids, **asked), full)


@torch.no_grad()
@pytest.mark.parametrize(
    ("some", "everything"),
    [
        (
            "vmoba(shape=(4, 4), tile=(2, 2), box=(1, 2, 2), blocks=4, before=1)",
            "select='topk', topk=4",
        ),
        ("rectified-spaattn(shape=(4, 4), block=4, before=1, neighbours=False)", "p_thr=1.0"),
    ],
)  # fmt: skip
def test_an_image_model_may_choose_blocks(some, everything):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    x = torch.randn(2, 3, 16, 16)
    dense = model(x).last_hidden_state
    with foveate.use(model, some):
        assert not torch.allclose(model(x).last_hidden_state, dense, atol=1e-3)
    with foveate.use(model, f"{some[:-1]}, {everything})"):
        torch.testing.assert_close(model(x).last_hidden_state, dense, atol=1e-5, rtol=1e-5)
