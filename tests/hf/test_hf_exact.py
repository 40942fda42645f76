"""`full` through foveate is the model's own eager attention: logits, generation, gradients."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CAUSAL, FULL, additive, padded, tiny, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache, T5Config, T5Model

import foveate
from foveate.hf import ModelError

CLOSE = 1e-4


def logits(model: PreTrainedModel, **inputs: object) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", CAUSAL)
def test_logits(family: str) -> None:
    model, ids = tiny(family), tokens(2, 29)
    eager = logits(model, input_ids=ids)
    with foveate.use(model, "full"):
        ours = logits(model, input_ids=ids)
    assert (eager - ours).abs().max() <= CLOSE
    # A model in which attention didn't matter would pass too.
    other = ids.clone()
    other[:, 20] = (other[:, 20] + 1) % 90 + 3
    assert (logits(model, input_ids=other) - eager)[:, -1].abs().max() > 10 * CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CAUSAL)
def test_padded_batch(family: str, side: str) -> None:
    model, ids, mask = tiny(family), tokens(3, 29), padded(3, 29, side)
    eager = logits(model, input_ids=ids, attention_mask=mask)
    with foveate.use(model, "full"):
        ours = logits(model, input_ids=ids, attention_mask=mask)
    assert (eager - ours)[mask.bool()].abs().max() <= CLOSE
    unmasked = logits(model, input_ids=ids)
    if side == "left":
        assert (eager - unmasked)[2, -1].abs().max() > 10 * CLOSE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", CAUSAL)
def test_generate(family: str, cache: str) -> None:
    model, ids, mask = tiny(family), tokens(3, 19), padded(3, 19, "left")
    options = {"max_new_tokens": 14, "do_sample": False, "attention_mask": mask}
    eager = model.generate(ids, **options)
    if cache == "static":
        options["cache_implementation"] = "static"
    with foveate.use(model, "full"):
        ours = model.generate(ids, **options)
        alone = model.generate(ids[:1], max_new_tokens=14, do_sample=False)
    assert torch.equal(eager, ours)
    assert torch.equal(alone, ours[:1])
    assert len(set(eager[0, 19:].tolist())) > 2


@pytest.mark.parametrize("family", FULL)
def test_beams(family: str) -> None:
    model, ids, mask = tiny(family), tokens(2, 11), padded(2, 11, "left")
    options = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False, "attention_mask": mask}
    eager = model.generate(ids, **options)
    with foveate.use(model, "full"):
        ours = model.generate(ids, **options)
    assert torch.equal(eager, ours)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("static", [False, True])
def test_chunked_prefill(family: str, static: bool) -> None:
    """Several queries against a cache: the causal mask is aligned to the end of what is filled."""
    model, ids, mask = tiny(family), tokens(2, 30), padded(2, 30, "left")

    def run() -> Tensor:
        cache = StaticCache(model.config, 40) if static else DynamicCache(config=model.config)
        parts, at = [], 0
        for size in (11, 1, 7, 11):
            parts.append(
                logits(
                    model,
                    input_ids=ids[:, at : at + size],
                    attention_mask=mask[:, : at + size],
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, at : at + size],
                    past_key_values=cache,
                )
            )
            at += size
        return torch.cat(parts, 1)

    eager = run()
    with foveate.use(model, "full"):
        ours = run()
    assert (eager - ours)[mask.bool()].abs().max() <= CLOSE


@pytest.mark.parametrize("family", CAUSAL)
def test_bf16(family: str) -> None:
    model, ids = tiny(family).to(torch.bfloat16), tokens(2, 29)
    eager = logits(model, input_ids=ids).float()
    exact = logits(model.float(), input_ids=ids)
    model.to(torch.bfloat16)
    with foveate.use(model, "full"):
        ours = logits(model, input_ids=ids).float()
    assert (ours - exact).norm() <= 2 * (eager - exact).norm()


@pytest.mark.parametrize("family", CAUSAL)
def test_gradients(family: str) -> None:
    model, ids, mask = tiny(family).train(), tokens(2, 17), padded(2, 17, "right")
    labels = ids.masked_fill(mask == 0, -100)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    eager = gradients()
    with foveate.use(model, "full"):
        ours = gradients()
    assert eager.keys() == ours.keys()
    for name, grad in eager.items():
        assert (grad - ours[name]).abs().max() <= 1e-4 * max(1.0, float(grad.abs().max())), name
    attended = [g.abs().max() for n, g in eager.items() if n.endswith("q_proj.weight")]
    assert min(attended) > 1e-4


def test_gradient_checkpointing() -> None:
    model, ids = tiny("llama").train(), tokens(2, 17)

    def gradient() -> Tensor:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    plain = gradient()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        with foveate.use(model, "full"):
            assert (gradient() - plain).abs().max() <= 1e-5
        model.gradient_checkpointing_disable()


def test_dropout_is_passed_on() -> None:
    model, ids = tiny("llama", attention_dropout=0.5).train(), tokens(1, 17)
    with foveate.use(model, "full"):
        once, again = logits(model, input_ids=ids), logits(model, input_ids=ids)
        still = logits(model.eval(), input_ids=ids)
        same = logits(model, input_ids=ids)
    assert (once - again).abs().max() > 1e-3
    assert torch.equal(still, same)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", CAUSAL)
def test_packed_sequences(family: str, rows: int) -> None:
    """Documents one after another in a row, told by position_ids that begin again."""
    model = tiny(family)
    lengths = [[5, 12, 7], [9, 9, 6]][:rows]
    ids = tokens(rows, 24)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    eager = logits(model, input_ids=ids, position_ids=positions, use_cache=False)
    with foveate.use(model, "full"):
        ours = logits(model, input_ids=ids, position_ids=positions, use_cache=False)
        start, end = lengths[0][0], sum(lengths[0][:2])
        alone = logits(model, input_ids=ids[:1, start:end])
    assert (eager - ours).abs().max() <= CLOSE
    # gpt-oss doesn't hand its position_ids on, so that its own documents see each other.
    if family != "gpt_oss":
        assert (alone - ours[:1, start:end]).abs().max() <= CLOSE


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kind", ["bool", "float", "bias"])
def test_four_dimensional_masks(kind: str, heads: int) -> None:
    model, ids = tiny("llama"), tokens(2, 21)
    allowed = (torch.rand(2, heads, 21, 21) < 0.4) | torch.eye(21, dtype=torch.bool)
    floats = additive(allowed)
    if kind == "bias":
        floats = floats + torch.randn(2, heads, 21, 21).masked_fill(~allowed, 0.0)
    eager = logits(model, input_ids=ids, attention_mask=floats)
    with foveate.use(model, "full"):
        given = allowed if kind == "bool" else floats
        ours = logits(model, input_ids=ids, attention_mask=given)
    assert (eager - ours).abs().max() <= CLOSE
    assert (eager - logits(model, input_ids=ids)).abs().max() > 10 * CLOSE


def test_bert() -> None:
    model, ids = tiny("bert"), tokens(3, 23)
    for side in ("right", "left"):
        mask = padded(3, 23, side)
        with torch.no_grad():
            eager = model(input_ids=ids, attention_mask=mask).last_hidden_state
            with foveate.use(model, "full"):
                ours = model(input_ids=ids, attention_mask=mask).last_hidden_state
            assert (eager - ours)[mask.bool()].abs().max() <= CLOSE
            assert (eager - model(input_ids=ids).last_hidden_state)[2].abs().max() > 10 * CLOSE


def test_whisper() -> None:
    model = tiny("whisper")
    sound, ids = torch.randn(2, 8, 60), tokens(2, 9)
    mask = padded(2, 9, "right")
    options = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        eager = model(input_features=sound, decoder_input_ids=ids, decoder_attention_mask=mask)
        text = model.generate(sound, **options)
        with foveate.use(model, "full"):
            ours = model(input_features=sound, decoder_input_ids=ids, decoder_attention_mask=mask)
            assert torch.equal(text, model.generate(sound, **options))
            assert torch.equal(
                text, model.generate(sound, cache_implementation="static", **options)
            )
    assert (eager.logits - ours.logits)[mask.bool()].abs().max() <= CLOSE
    difference = eager.encoder_last_hidden_state - ours.encoder_last_hidden_state
    assert difference.abs().max() <= CLOSE


def test_relative_position_bias() -> None:
    config = T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    model = T5Model(config).eval()
    model.set_attn_implementation("eager")
    inputs = {
        "input_ids": tokens(2, 15),
        "attention_mask": padded(2, 15, "right"),
        "decoder_input_ids": tokens(2, 7),
    }
    with torch.no_grad():
        eager = model(**inputs).last_hidden_state
        with foveate.use(model, "full"):
            ours = model(**inputs).last_hidden_state
    assert (eager - ours).abs().max() <= CLOSE


def test_attention_weights_are_refused() -> None:
    for family, extra in (("llama", {}), ("whisper", {"input_features": torch.randn(1, 8, 60)})):
        model = tiny(family)
        name = "decoder_input_ids" if extra else "input_ids"
        with (
            foveate.use(model, "full"),
            pytest.raises(ModelError, match="output_attentions"),
        ):
            model(**{name: tokens(1, 5)}, **extra, output_attentions=True)


def test_compiled_model() -> None:
    """Under torch.compile the graph breaks at attention, and the masks are still there."""
    model, ids, mask = tiny("llama", num_hidden_layers=1), tokens(2, 13), padded(2, 13, "left")
    eager = logits(model, input_ids=ids, attention_mask=mask)
    with foveate.use(model, "full"):
        compiled = torch.compile(model, backend="eager", dynamic=False)
        ours = logits(compiled, input_ids=ids, attention_mask=mask)
    torch._dynamo.reset()
    assert (eager - ours)[mask.bool()].abs().max() <= CLOSE
