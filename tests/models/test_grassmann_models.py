"""Whole Grassmann models: the paper's sizes, both wirings, learned positions, an encoder."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from foveate import causal
from foveate.ops.errors import InputError
from foveate.parts import Context

transformers = pytest.importorskip("transformers")

from foveate.models import FoveateConfig, FoveateForCausalLM  # noqa: E402


def config(**options) -> FoveateConfig:
    given = {
        "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "initializer_range": 0.3, "position": "learned", "norm": "layer",
        "feedforward": "gelu", "mixer": "grassmann(rank=4, offsets=(1, 3), dropout=0.0)",
        "max_position_embeddings": 24,
    }  # fmt: skip
    return FoveateConfig(**(given | options))


def model(**options) -> FoveateForCausalLM:
    torch.manual_seed(0)
    return FoveateForCausalLM(config(**options)).double().eval()


def ids(length=17, batch=2):
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("layers", "length", "millions"), [(6, 128, 12.61), (12, 256, 17.41)])
def test_parameters_of_the_papers_models(layers, length, millions):
    """By the spec's formula; the published counts are about 65.5k a layer higher."""
    made = FoveateForCausalLM(
        config(
            vocab_size=30522, hidden_size=256, num_hidden_layers=layers, intermediate_size=1024,
            max_position_embeddings=length, mixer="grassmann(wiring='B')",
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    count = sum(p.numel() for p in made.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)
    d, r, c = 256, 32, 496
    mixer = (d * r + r) + (c * d + d) + (2 * d * d + d) + 2 * d
    block = mixer + (8 * d * d + 5 * d) + 2 * (2 * d)
    assert count == 30522 * d + length * d + layers * block + 2 * d


def test_wiring_a_has_no_residual_around_the_mixer():
    lm = model()
    x = torch.randn(2, 17, 16, dtype=torch.float64)
    block = lm.model.layers[0]
    assert block.attention_norm is None
    u = block.attention.mixer(x, Context(mask=causal()))
    inner = block.feedforward
    wide = functional.gelu(u @ inner.up.weight.T + inner.up.bias)
    expected = functional.layer_norm(
        u + wide @ inner.down.weight.T + inner.down.bias, (16,), eps=lm.config.rms_norm_eps
    )
    torch.testing.assert_close(block(x, Context(mask=causal())).y, expected)
    assert isinstance(lm.model.norm, torch.nn.Identity)


def test_wiring_b_is_pre_norm():
    lm = model(mixer="grassmann(rank=4, wiring='B', dropout=0.0)")
    x = torch.randn(2, 17, 16, dtype=torch.float64)
    block = lm.model.layers[0]

    def norm(h):
        return functional.layer_norm(h, (16,), eps=lm.config.rms_norm_eps)

    first = x + block.attention.mixer(norm(x), Context(mask=causal()))
    expected = first + block.feedforward(norm(first))
    torch.testing.assert_close(block(x, Context(mask=causal())).y, expected)
    assert isinstance(lm.model.norm, torch.nn.LayerNorm)


@pytest.mark.parametrize("wiring", ["A", "B"])
def test_learned_positions_in_steps_and_beside_padding(wiring):
    lm, given = model(mixer=f"grassmann(rank=4, wiring={wiring!r}, dropout=0.0)"), ids()
    with torch.no_grad():
        want = lm(given, use_cache=False).logits
        cache = lm.new_cache()
        parts = [lm(p, past_key_values=cache).logits for p in given.split([9, 1, 7], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), want)
        mask = torch.ones_like(given)
        mask[1, :6] = 0
        padded = lm(given, attention_mask=mask).logits
        torch.testing.assert_close(padded[1:, 6:], lm(given[1:, 6:]).logits)
        lm.model.embed_positions.weight[3] += 1
        moved = (lm(given, use_cache=False).logits != want).any(-1).any(0)
        assert moved.nonzero()[0] == 3
        positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
        packed = lm(given[:1, :12], position_ids=positions).logits
        torch.testing.assert_close(packed[:, 5:], lm(given[:1, 5:12]).logits)
        torch.testing.assert_close(packed[:, :5], lm(given[:1, :5]).logits)
    with pytest.raises(InputError, match="learned 24 positions"):
        lm(ids(25))


def test_what_the_config_refuses():
    with pytest.raises(InputError, match="rms"):
        model(norm="batch")
    with pytest.raises(InputError, match="gelu"):
        model(feedforward="relu")
    with pytest.raises(InputError, match="is unknown"):
        model(position="alibi")


@pytest.mark.parametrize(
    "more",
    [
        {"mixer": "grassmann(rank=8)", "position": "learned", "max_position_embeddings": 32},
        {"mixer": "static-emb-qk"},
        {"mixer": ["deconstructed-mlp", None]},
        {"attention": "deconstructed-approximate"},
        {"attention": "deconstructed-nonapproximate"},
    ],
)
def test_they_classify_real_texts_in_the_encoder(more):
    from foveate.papers.tasks import Classification, load
    from foveate.papers.training.classify import encoder_classifier
    from foveate.papers.training.language import Sizes
    from foveate.papers.training.loop import train
    from foveate.papers.training.objective import evaluate
    from foveate.papers.training.regime import Regime

    task = Classification(load("banking77"), length=24, held=64)
    torch.manual_seed(0)
    made = encoder_classifier(Sizes(2, 32, 4, 24, task.vocab), task.classes, **more)
    before = evaluate(made, task, "validation")["loss"]
    train(made, task, Regime(steps=40, batch=16, lr=6e-3, every=40))
    assert evaluate(made, task, "validation")["loss"] < before - 0.05


def test_a_reference_stream_has_no_place_in_an_encoder():
    from foveate.models import FoveateEncoder, FoveateEncoderConfig

    with pytest.raises(InputError, match="reference stream"):
        FoveateEncoder(FoveateEncoderConfig(hidden_size=16, mixer="rnd-emb-qk"))
