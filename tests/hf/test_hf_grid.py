"""Neighborhood attention in transformers' models of images and videos."""

from __future__ import annotations

import pytest
import torch

from foveate import neighborhood
from foveate.ops.errors import InputError

transformers = pytest.importorskip("transformers")

from foveate.hf import ModelError, TokenGrid, token_grid, use_on_grid  # noqa: E402

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32}  # fmt: skip


def vit():
    config = transformers.ViTConfig(image_size=24, patch_size=4, **SMALL)
    return transformers.ViTModel(config).eval(), torch.randn(2, 3, 24, 24)


def video():
    config = transformers.VideoMAEConfig(
        image_size=16, patch_size=4, num_frames=8, tubelet_size=2, **SMALL
    )
    return transformers.VideoMAEModel(config).eval(), torch.randn(1, 8, 3, 16, 16)


def test_the_grid_is_read_from_the_config():
    assert token_grid(vit()[0]) == TokenGrid((6, 6), 1)
    assert token_grid(video()[0]) == TokenGrid((4, 4, 4))
    dino = transformers.Dinov2WithRegistersConfig(
        image_size=28, patch_size=14, num_register_tokens=3, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    assert token_grid(transformers.Dinov2WithRegistersModel(dino)) == TokenGrid((2, 2), 4)
    with pytest.raises(ModelError, match="TokenGrid"):
        token_grid(torch.nn.Linear(2, 2))


def test_of_a_model_for_text_and_images_the_part_for_images_is_asked_for():
    text = {"vocab_size": 9, "max_position_embeddings": 8, **SMALL}
    images = {"image_size": 24, "patch_size": 4, **SMALL}
    both = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=images))
    with pytest.raises(ModelError, match="vision_model"):
        use_on_grid(both, window=3)
    assert token_grid(both.vision_model) == TokenGrid((6, 6), 1)


def masked(model, pixels, allowed):
    """The model's own eager attention under an additive mask that hooks put in."""
    model.set_attn_implementation("eager")
    hidden = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    modeling = __import__(type(model).__module__, fromlist=["x"])
    original = modeling.eager_attention_forward

    def forward(module, query, key, value, attention_mask, *args, **kwargs):
        return original(module, query, key, value, hidden[None, None], *args, **kwargs)

    modeling.eager_attention_forward = forward
    try:
        with torch.no_grad():
            return model(pixels).last_hidden_state
    finally:
        modeling.eager_attention_forward = original


@pytest.mark.parametrize("make", [vit, video])
def test_a_model_sees_its_neighborhoods_and_is_put_back(make):
    model, pixels = make()
    grid = token_grid(model)
    with torch.no_grad():
        before = model(pixels).last_hidden_state
        with use_on_grid(model, window=3, stride=(1,) * (len(grid.shape) - 1) + (2,)):
            local = model(pixels).last_hidden_state
        assert torch.equal(model(pixels).last_hidden_state, before)
        with use_on_grid(model, window=grid.shape):
            torch.testing.assert_close(
                model(pixels).last_hidden_state, before, atol=1e-5, rtol=1e-5
            )
    mask = neighborhood(grid.shape, 3, (1,) * (len(grid.shape) - 1) + (2,))
    n = mask.tokens + grid.before
    allowed = torch.ones(n, n, dtype=torch.bool)
    allowed[grid.before :, grid.before :] = mask.dense(mask.tokens, mask.tokens)[0, 0]
    torch.testing.assert_close(local, masked(model, pixels, allowed), atol=1e-5, rtol=1e-5)
    assert (local - before).abs().max() > 1e-4


def test_a_window_that_does_not_fit_is_refused_before_any_use():
    model, pixels = vit()
    with pytest.raises(InputError, match="axis 0 has 6 tokens"):
        use_on_grid(model, window=7)
    with use_on_grid(model, 3, grid=TokenGrid((5, 6))), pytest.raises(InputError, match="37 keys"):
        model(pixels)
