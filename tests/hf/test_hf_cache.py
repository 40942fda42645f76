"""StreamingLLM's bounded cache under transformers' own generation.

A one-layer model is its own oracle: its keys depend on the token alone, so that the step at which
certain tokens are kept must equal the model run on just those tokens, numbered 0, 1, 2, ...
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import SIZES, padded, tiny, tokens
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SmolLM3Config,
)

import foveate
from foveate.hf import ModelError, streaming_cache
from foveate.ops.errors import InputError

CLOSE = 1e-4
SINKS, SPAN = 2, 6


def kept(ids: Tensor) -> Tensor:
    """Of (B, L) ids those that the cache holds when the last one attends."""
    if ids.shape[1] <= SINKS + SPAN:
        return ids
    return torch.cat([ids[:, :SINKS], ids[:, -SPAN:]], 1)


def last_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, -1]


def stream(model: PreTrainedModel, ids: Tensor, cache: Any, chunks: list[int], **more: Any) -> Any:
    """Feed ids chunk by chunk; the last logits of each chunk."""
    at, out = 0, []
    mask = more.get("attention_mask")
    for size in chunks:
        inputs: dict[str, Any] = {"input_ids": ids[:, at : at + size]}
        if mask is not None:
            inputs["attention_mask"] = mask[:, : at + size]
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, at : at + size]
        with torch.no_grad():
            out.append(model(**inputs, past_key_values=cache).logits[:, -1])
        at += size
    return out


def rotations() -> dict[str, PreTrainedConfig]:
    """Models that turn their keys in different ways."""
    small = {k: v for k, v in SIZES.items() if k != "head_dim"} | {"num_hidden_layers": 1}
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return {
        "halves": LlamaConfig(**small),
        "yarn": LlamaConfig(**small, rope_parameters=yarn),
        "interleaved": CohereConfig(**small),
        "partial": PhiConfig(**small),
        "partial interleaved": Glm4Config(**small, head_dim=16),
        "neox": GPTNeoXConfig(
            **{k: v for k, v in small.items() if k != "num_key_value_heads"}, rotary_pct=0.25
        ),
    }


@pytest.mark.parametrize("kind", sorted(rotations()))
@pytest.mark.parametrize("chunks", [[1] * 24, [5, 6, 1, 1, 4, 6, 1]])
def test_steps_equal_the_kept_tokens_alone(kind: str, chunks: list[int]) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(rotations()[kind], attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.4)
    ids = tokens(2, 24)
    cache = streaming_cache(model, SINKS, SPAN)
    at, moved = 0, 0.0
    for size, ours in zip(chunks, stream(model, ids, cache, chunks)):
        at += size
        expected = last_logits(model, kept(ids[:, :at]))
        assert (ours - expected).abs().max() <= CLOSE
        moved = max(moved, float((last_logits(model, ids[:, :at]) - ours).abs().max()))
    assert len(cache.layers[0].cache) == SINKS + SPAN
    assert moved > 100 * CLOSE


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "foveate"])
def test_padded_rows_are_as_if_alone(implementation: str) -> None:
    """Each row keeps its own first real tokens; padding leaves first."""
    model = tiny("llama", num_hidden_layers=1)
    ids, mask = tokens(3, 30), padded(3, 30, "left")
    starts = (mask == 0).sum(1)
    cache = streaming_cache(model, SINKS, SPAN, attention_mask=mask[:, :9])
    chunks = [9] + [1] * 9 + [3, 6, 3]

    def run() -> list[Tensor]:
        return stream(model, ids, cache, chunks, attention_mask=mask)

    if implementation == "foveate":
        with foveate.use(model, f"sink-window(sinks={SINKS}, window={SPAN})"):
            steps = run()
    else:
        model.set_attn_implementation(implementation)
        steps = run()
        model.set_attn_implementation("eager")
    for at, ours in zip(torch.tensor(chunks).cumsum(0).tolist(), steps):
        if at == 9:
            continue  # longer than the window: attended to whole, at the sequence's positions
        for row in range(3):
            expected = last_logits(model, kept(ids[row : row + 1, starts[row] : at]))
            assert (ours[row] - expected[0]).abs().max() <= CLOSE, (at, row)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_oss"])
def test_without_reindexing_it_is_the_mask_view(family: str) -> None:
    """Several layers: decoding with the ring equals the whole forward under sinks and window."""
    model, ids, mask = tiny(family), tokens(2, 26), padded(2, 26, "left")
    pattern = f"sink-window(sinks={SINKS}, window={SPAN})"
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    chunks = [5] + [1] * 21
    with foveate.use(model, pattern), torch.no_grad():
        at_once = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    cache = streaming_cache(model, SINKS, SPAN, attention_mask=mask[:, :5], reindex=False)
    # Sliding layers of the model's own need the pattern as well; the ring alone does the others.
    with foveate.use(model, pattern):
        steps = stream(model, ids, cache, chunks, attention_mask=mask)
    expected = at_once[:, [4, *range(5, 26)]]
    assert (torch.stack(steps, 1) - expected).abs().max() <= CLOSE
    if family in ("llama", "qwen3"):
        cache = streaming_cache(model, SINKS, SPAN, attention_mask=mask[:, :5], reindex=False)
        steps = stream(model, ids, cache, chunks, attention_mask=mask)
        assert (torch.stack(steps, 1) - expected).abs().max() <= CLOSE


def test_it_holds_everything_that_fits() -> None:
    """Below its capacity it is an ordinary cache."""
    for family in ("llama", "gemma3"):
        model, ids, mask = tiny(family), tokens(2, 10), padded(2, 10, "left")
        options: dict[str, Any] = {
            "attention_mask": mask,
            "max_new_tokens": 15,
            "do_sample": False,
            "num_beams": 2,
        }
        cache = streaming_cache(model, 4, 60, attention_mask=mask)
        expected = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)


def test_long_generation_in_bounded_memory() -> None:
    model, ids = tiny("llama", num_hidden_layers=1), tokens(1, 5)
    cache = streaming_cache(model, SINKS, SPAN)
    with foveate.use(model, "full"):
        out = model.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=200,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    layer = cache.layers[0]
    held = layer.cache.bytes()
    assert len(layer.cache) == SINKS + SPAN
    assert held == 2 * (SINKS + SPAN) * 2 * 16 * 4  # keys and values, 2 heads of 16 fp32
    assert layer.get_seq_length() == 204
    for step in (0, 3, 50, 199):
        expected = last_logits(model, kept(out.sequences[:, : 5 + step]))
        assert (out.logits[step] - expected).abs().max() <= CLOSE
    assert len(set(out.sequences[0].tolist())) > 5


def test_a_conversation_goes_on() -> None:
    """The same cache over several calls of generate."""
    model, ids = tiny("llama", num_hidden_layers=1), tokens(1, 5)
    cache = streaming_cache(model, SINKS, SPAN)
    said = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    said = torch.cat([said, tokens(1, 3)], 1)
    out = model.generate(
        said,
        attention_mask=torch.ones_like(said),
        past_key_values=cache,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = last_logits(model, kept(out.sequences[:, :-1]))
    assert (out.logits[-1] - expected).abs().max() <= CLOSE


def test_beams_beyond_the_capacity() -> None:
    """The score of each beam is the sum of its steps, each on the tokens that beam then kept."""
    model, ids, mask = tiny("llama", num_hidden_layers=1), tokens(2, 7), padded(2, 7, "left")
    cache = streaming_cache(model, SINKS, SPAN, attention_mask=mask[:, :7])
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "num_beams": 3,
        "do_sample": False,
        "length_penalty": 0.0,
        "output_scores": True,
        "return_dict_in_generate": True,
        "num_return_sequences": 2,
    }
    with foveate.use(model, f"sink-window(sinks={SINKS}, window={SPAN})"):
        out = model.generate(ids, past_key_values=cache, **options)
    starts = (mask == 0).sum(1).repeat_interleave(2)
    for row, start in enumerate(starts.tolist()):
        total = 0.0
        for at in range(7, 19):
            step = last_logits(model, kept(out.sequences[row : row + 1, start:at]))
            total += float(step.log_softmax(-1)[0, out.sequences[row, at]])
        assert abs(total - float(out.sequences_scores[row])) <= 1e-3
    # Beams did move between rows of the cache once tokens had been dropped.
    assert all(len(set(row[4:].tolist())) > 1 for row in out.beam_indices)


def test_prefill_in_chunks_through_generate() -> None:
    model, ids = tiny("llama", num_hidden_layers=1), tokens(1, 40)
    whole, parts = streaming_cache(model, SINKS, SPAN), streaming_cache(model, SINKS, SPAN)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    dense = model.generate(ids, past_key_values=whole, **options)
    chunked = model.generate(ids, past_key_values=parts, prefill_chunk_size=SPAN, **options)
    # A prompt longer than the window is attended to whole ...
    assert (dense.logits[0] - last_logits(model, ids)).abs().max() <= CLOSE
    # ... unless it's streamed as well.
    assert (chunked.logits[0] - last_logits(model, kept(ids))).abs().max() <= CLOSE
    assert len(whole.layers[0].cache) == len(parts.layers[0].cache) == SINKS + SPAN


def test_editing() -> None:
    model = tiny("llama", num_hidden_layers=1)
    ids = tokens(3, 20)
    cache = streaming_cache(model, SINKS, SPAN)
    stream(model, ids, cache, [1] * 12)
    with pytest.raises(InputError, match="drop"):
        cache.crop(-1)
    cache.batch_select_indices(torch.tensor([2, 0]))
    step = stream(model, ids[[2, 0], 12:], cache, [1])[0]
    assert (step - last_logits(model, kept(ids[[2, 0], :13]))).abs().max() <= CLOSE
    cache.batch_repeat_interleave(2)
    twice = ids[[2, 2, 0, 0]]
    step = stream(model, twice[:, 13:], cache, [1])[0]
    assert (step - last_logits(model, kept(twice[:, :14]))).abs().max() <= CLOSE
    cache.reset()
    assert cache.get_seq_length() == 0
    steps = stream(model, ids, cache, [4, 3])
    cache.crop(-3)
    assert cache.get_seq_length() == 4
    again = stream(model, ids[:, 4:], cache, [3])
    assert torch.equal(steps[1], again[0])


def test_layers_without_positions_are_left_alone() -> None:
    small = {k: v for k, v in SIZES.items() if k != "head_dim"}
    config = SmolLM3Config(**small | {"num_hidden_layers": 2}, no_rope_layers=[1, 0])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ropes = [layer.rope for layer in streaming_cache(model).layers]
    assert ropes[0] is not None
    assert ropes[1] is None


def test_layers_that_are_bounded_keep_their_own_cache() -> None:
    model, ids = tiny("gemma3"), tokens(1, 5)
    cache = streaming_cache(model, SINKS, 20)
    model.generate(ids, past_key_values=cache, max_new_tokens=60, do_sample=False)
    names = [type(layer).__name__ for layer in cache.layers]
    assert names == ["DynamicSlidingWindowLayer", "SinkWindowLayer", "DynamicSlidingWindowLayer"]
    assert len(cache.layers[1].cache) == SINKS + 20


def test_what_cannot_stream_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="window"):
        streaming_cache(model, 4, 0)
    with pytest.raises(InputError, match="left padding"):
        streaming_cache(model, attention_mask=padded(2, 9, "right"))
    with pytest.raises(InputError, match="2-D"):
        streaming_cache(model, attention_mask=torch.ones(1, 1, 3, 3))
    with pytest.raises(ModelError, match="encoder"):
        streaming_cache(tiny("whisper"))
    windowed = AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=8))
    with pytest.raises(ModelError, match="no layer of full attention"):
        streaming_cache(windowed)
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = LlamaConfig(**SIZES, rope_parameters=parameters)
    with pytest.raises(ModelError, match="dynamic"):
        streaming_cache(LlamaForCausalLM(config))
    gpt2 = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=4)
    )
    with pytest.raises(ModelError, match="no rotary"):
        streaming_cache(gpt2)
    assert streaming_cache(gpt2, reindex=False).layers[0].rope is None
    cache = streaming_cache(model, attention_mask=padded(2, 9, "left"))
    with pytest.raises(InputError, match="batch of 3"):
        model(input_ids=tokens(3, 4), past_key_values=cache)
    # Padding that the cache wasn't told of is found out as soon as it would matter.
    ids, mask = tokens(2, 20), padded(2, 20, "left")
    cache = streaming_cache(model, SINKS, SPAN)
    with foveate.use(model, "full"), pytest.raises(ModelError, match="attention_mask=mask"):
        stream(model, ids, cache, [6] + [1] * 14, attention_mask=mask)


def test_making_one_leaves_the_model_as_it_was() -> None:
    model, ids = tiny("llama").train(), tokens(1, 9)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    streaming_cache(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == 9


def test_crop_counts_as_transformers_own_layers_do() -> None:
    model, ids = tiny("llama"), tokens(1, 10)
    for cache in (DynamicCache(config=model.config), streaming_cache(model, 2, 20)):
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
            layer = cache.layers[0]
            with pytest.raises(ValueError, match="positive"):
                layer.crop(4)
            layer.crop(0)
            assert layer.get_seq_length() == 10
            layer.crop(-4)
            assert layer.get_seq_length() == 6
    with pytest.raises(InputError, match="only 6 tokens"):
        layer.crop(-7)
