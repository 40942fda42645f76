"""A trained model's MLA layers as TPLA: exact where it should be, saved and loaded."""

from __future__ import annotations

import pytest
import torch

from foveate.methods.tpla import TPLA, TPLAProjection
from foveate.ops.errors import InputError

pytest.importorskip("transformers")

from foveate.models import FoveateConfig, FoveateForCausalLM, to_tpla  # noqa: E402

IDS = torch.randint(40, (2, 30), generator=torch.Generator().manual_seed(1))
MLA = "mla(latent=16, rope_dim=4, query_rank=12)"


def model(projection=MLA):
    torch.manual_seed(0)
    config = FoveateConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        projection=projection, initializer_range=0.3,
    )  # fmt: skip
    made = FoveateForCausalLM(config).eval().double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return made


@torch.no_grad()
def test_prefill_is_exact_and_decoding_is_not():
    lm = model()
    made = to_tpla(lm, calibration=IDS)
    torch.testing.assert_close(made(IDS).logits, lm(IDS).logits)
    cache = made.new_cache()
    made(IDS[:, :29], past_key_values=cache)
    last = made(IDS[:, 29:], past_key_values=cache).logits
    assert (last - lm(IDS).logits[:, 29:]).abs().max() > 1e-6
    assert isinstance(made.model.layers[0].attention.projection, TPLAProjection)
    assert not isinstance(lm.model.layers[0].attention.projection, TPLAProjection)


@torch.no_grad()
@pytest.mark.parametrize("transform", ["pca", "hadamard", "identity"])
def test_with_exact_norm_and_softmax_it_is_the_model(transform):
    lm = model()
    recipe = TPLA(norm="exact", softmax="exact", pd_sep=False)
    made = to_tpla(lm, recipe, transform, IDS, mu="one")
    torch.testing.assert_close(made(IDS).logits, lm(IDS).logits)


@torch.no_grad()
def test_a_converted_model_is_saved_and_loaded(tmp_path):
    lm = model(["mha", MLA])
    made = to_tpla(lm, TPLA(groups=4, heads="blocks", pd_sep=False), calibration=IDS)
    made.save_pretrained(tmp_path)
    again = FoveateForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(IDS).logits, made(IDS).logits)
    assert again.config.projection[0] == "mha"
    assert "heads='blocks'" in again.config.projection[1]


def test_what_it_refuses():
    with pytest.raises(InputError, match="no layer of this model is an MLA"):
        to_tpla(model("mha"))
    with pytest.raises(InputError, match="PCA needs latents"):
        to_tpla(model())
    with pytest.raises(InputError, match="no layer"):
        to_tpla(to_tpla(model(), transform="hadamard"))
