"""transformers' Doge models on foveate's engine: the same logits, gradients and generated text."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from foveate.hf import ModelError, dynamic_mask  # noqa: E402


def distinct(length):
    """Tokens that are all different: equal ones are equally important in the first layer, and
    which of them transformers keeps is unspecified."""
    return torch.stack([torch.randperm(127)[:length] + 1 for _ in range(2)])


def doge(window=12, attention="eager", **more):
    config = transformers.DogeConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, keep_window_size=window,
        pad_token_id=0, **more,
    )  # fmt: skip
    model = transformers.DogeForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.A.normal_()
            layer.self_attn.dt_proj.weight.normal_()
            layer.input_residual.normal_()
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("more", [{}, {"window": 100}, {"attention_bias": True}, {"is_moe": True,
                         "num_experts": 16, "num_experts_per_tok": 4}])  # fmt: skip
def test_logits_are_the_models_own(attention, more):
    model = doge(attention=attention, **more)
    ids = distinct(50)
    with torch.no_grad():
        expected = model(ids).logits
        with dynamic_mask(model):
            got = model(ids).logits
        assert torch.equal(model(ids).logits, expected)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_choice_matters_at_this_size():
    model = doge()
    ids = distinct(50)
    with torch.no_grad(), dynamic_mask(model):
        sparse = model(ids).logits
        for layer in model.model.layers:
            layer.self_attn.keep_window_size = 100
        assert not torch.allclose(model(ids).logits, sparse, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    model = doge()
    ids = distinct(40)
    seen = torch.ones_like(ids)
    seen[1, slice(0, 9) if side == "left" else slice(31, 40)] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=seen).logits
        with dynamic_mask(model):
            got = model(ids, attention_mask=seen).logits
    real = seen.bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)


def test_generated_text_is_the_same_and_weights_stay_where_they_are(tmp_path):
    model = doge()
    ids = distinct(30)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    names = set(model.state_dict())
    with dynamic_mask(model) as used:
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
        assert set(model.state_dict()) == names
        with pytest.raises(ModelError, match="in use already"):
            dynamic_mask(model)
    used.undo()


def test_gradients_are_the_models_own():
    model = doge().double()
    ids = distinct(40)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    with dynamic_mask(model):
        got = gradients()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, msg=name)
    assert expected["model.layers.0.self_attn.A"].abs().min() > 0


def test_other_models_are_refused():
    with pytest.raises(ModelError, match="no DogeAttention"):
        dynamic_mask(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="sliding window"):
        dynamic_mask(doge(sliding_window=8))


def test_random_numbers_are_left_alone():
    model, ids = doge(), distinct(20)
    before = torch.random.get_rng_state()
    with torch.no_grad(), dynamic_mask(model):
        model(ids)
    assert torch.equal(torch.random.get_rng_state(), before)
