"""Patterns inside models against the model's own eager attention under the same mask, by brute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import CAUSAL, WINDOW, additive, padded, tiny, tokens
from torch import Tensor
from transformers import PreTrainedModel

import foveate
from foveate.hf import Assignment, sites

CLOSE = 1e-4
SINKS, SPAN = 2, 5
PATTERN = f"sink-window(sinks={SINKS}, window={SPAN})"


def logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def sink_window(length: int, starts: Tensor, span: int = SPAN) -> Tensor:
    """The pattern's definition, with sinks from each row's first real token: (B, 1, L, L)."""
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    first = starts[:, None, None]
    allowed = (k <= q) & ((k < first + SINKS) | (q - k < span)) & (k >= first)
    # A padding query must see something, or eager attention answers with a mean of everything.
    return (allowed | (q == k))[:, None]


@contextmanager
def masked_by(model: PreTrainedModel, per_layer: list[Tensor]) -> Iterator[None]:
    """Eager attention whose layers are handed these masks (bool, per layer) instead of theirs."""

    def put(mask: Tensor) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"attention_mask": additive(mask)}

        return hook

    handles = [
        module.register_forward_pre_hook(put(mask), with_kwargs=True)
        for module, mask in zip(sites(model), per_layer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_masks(model: PreTrainedModel, base: Tensor) -> list[Tensor]:
    """The pattern within the sliding windows of the model's own."""
    q, k = torch.arange(base.shape[-2])[:, None], torch.arange(base.shape[-1])[None]
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * 3
    band = q - k < WINDOW
    return [base & band if kind == "sliding_attention" else base for kind in types]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", CAUSAL)
def test_sink_window_is_the_brute_force_mask(family: str, side: str) -> None:
    model, ids = tiny(family), tokens(3, 27)
    mask = torch.ones(3, 27, dtype=torch.int64) if side == "none" else padded(3, 27, side)
    starts = (mask.cumsum(1) == 0).sum(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    for span in (SPAN, 12):
        pattern = f"sink-window(sinks={SINKS}, window={span})"
        expected_masks = layer_masks(model, sink_window(27, starts, span))
        with masked_by(model, expected_masks):
            expected = logits(model, **inputs)
        with foveate.use(model, pattern):
            ours = logits(model, **inputs)
        real = mask.bool()
        assert (expected - ours)[real].abs().max() <= CLOSE
        if span == SPAN:
            assert (logits(model, **inputs) - ours)[real].abs().max() > 10 * CLOSE


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", CAUSAL)
def test_decoding_equals_the_whole_forward(family: str, cache: str | None) -> None:
    """Token by token with a cache, padded on the left, the pattern sees what it sees at once."""
    model, ids, mask = tiny(family), tokens(3, 15), padded(3, 15, "left")
    with foveate.use(model, PATTERN):
        options = {"cache_implementation": cache} if cache else {}
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        whole = torch.cat([mask, torch.ones(3, 12, dtype=torch.int64)], 1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)
        at_once = logits(
            model, input_ids=out.sequences, attention_mask=whole, position_ids=positions
        )
    steps = torch.stack(out.logits, 1)
    assert (steps - at_once[:, 14:-1]).abs().max() <= CLOSE


def test_packed_documents_are_as_if_alone() -> None:
    model, ids = tiny("llama"), tokens(2, 30)
    lengths = [[9, 14, 7], [14, 9, 7]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    for pattern in (PATTERN, "vertical-slash(verticals=2, slashes=2, last=4)"):
        with foveate.use(model, pattern):
            packed = logits(model, input_ids=ids, position_ids=positions, use_cache=False)
            for row, sizes in enumerate(lengths):
                at = 0
                for size in sizes:
                    alone = logits(model, input_ids=ids[row : row + 1, at : at + size])
                    assert (alone - packed[row : row + 1, at : at + size]).abs().max() <= CLOSE
                    at += size


def test_packed_gradients() -> None:
    model, ids = tiny("llama").train(), tokens(1, 21)
    positions = torch.cat([torch.arange(n) for n in (8, 8, 5)])[None]

    def gradient(**inputs: Any) -> Tensor:
        model.zero_grad()
        model(**inputs, use_cache=False).logits.square().sum().backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    with foveate.use(model, PATTERN):
        packed = gradient(input_ids=ids, position_ids=positions)
        parts = [gradient(input_ids=ids[:, a:b]) for a, b in ((0, 8), (8, 16), (16, 21))]
    total = torch.stack(parts).sum(0)
    assert (packed - total).abs().max() <= 1e-4 * total.abs().max()


GROUPS = [
    # Whole key/value groups, groups that are split, and a head alone; 4 heads on 2 and on 1.
    ({"0-1": PATTERN}, {0, 1}),
    ({"1,2": PATTERN}, {1, 2}),
    ({"0": "full", "1-3": PATTERN}, {1, 2, 3}),
    ({"3": PATTERN, "0,2": "full"}, {3}),
]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("heads", "patterned"), GROUPS)
def test_patterns_per_head(heads: dict[str, str], patterned: set[int], kv_heads: int) -> None:
    model = tiny("llama", num_key_value_heads=kv_heads)
    ids, mask = tokens(2, 21), padded(2, 21, "left")
    starts = (mask.cumsum(1) == 0).sum(1)
    causal = torch.ones(21, 21, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    causal = causal | torch.eye(21, dtype=torch.bool)
    sparse = sink_window(21, starts)
    mixed = torch.stack([(sparse if h in patterned else causal)[:, 0] for h in range(4)], dim=1)
    with masked_by(model, [causal, mixed, sparse]):
        expected = logits(model, input_ids=ids)
    assignment = Assignment({1: heads, 2: PATTERN})
    with foveate.use(model, assignment):
        ours = logits(
            model, input_ids=ids, attention_mask=mask, position_ids=torch.arange(21)[None]
        )
    assert (expected - ours)[mask.bool()].abs().max() <= CLOSE


def test_patterns_per_head_with_learned_sinks_and_gradients() -> None:
    model, ids = tiny("gpt_oss").train(), tokens(2, 17)
    base = sink_window(17, torch.zeros(2, dtype=torch.int64)).expand(-1, 4, -1, -1).clone()
    base[:, [0, 2]] = torch.ones(17, 17, dtype=torch.bool).tril()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids).logits.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if "self_attn" in n}

    with masked_by(model, layer_masks(model, base)):
        expected = gradients()
    heads = {"1,3": PATTERN}
    with foveate.use(model, Assignment({0: heads, 1: heads, 2: heads})):
        ours = gradients()
    for name, grad in expected.items():
        assert (grad - ours[name]).abs().max() <= 1e-4 * max(1.0, float(grad.abs().max())), name
    assert expected["model.layers.0.self_attn.sinks"].abs().max() > 1e-6


def test_patterns_per_head_under_masks_per_head() -> None:
    model, ids = tiny("llama"), tokens(2, 21)
    given = (torch.rand(2, 4, 21, 21) < 0.6).tril() | torch.eye(21, dtype=torch.bool)
    bias = torch.randn(2, 4, 21, 21)
    sparse = sink_window(21, torch.zeros(2, dtype=torch.int64))
    mixed = given.clone()
    mixed[:, [1, 2]] &= sparse
    floor = torch.finfo(torch.float32).min

    def put(mask: Tensor) -> Tensor:
        return bias.masked_fill(~mask, floor)

    handles = [
        module.register_forward_pre_hook(
            lambda m, a, k: (a, k | {"attention_mask": put(mixed)}), with_kwargs=True
        )
        for module in sites(model)
    ]
    expected = logits(model, input_ids=ids)
    for handle in handles:
        handle.remove()
    heads = {"1,2": PATTERN}
    with foveate.use(model, Assignment({0: heads, 1: heads, 2: heads})):
        ours = logits(model, input_ids=ids, attention_mask=put(given))
    assert (expected - ours).abs().max() <= CLOSE


def test_encoder() -> None:
    """In an encoder the window reaches both ways, within the padding."""
    model, ids, mask = tiny("bert"), tokens(3, 23), padded(3, 23, "right")
    q, k = torch.arange(23)[:, None], torch.arange(23)[None]
    allowed = ((k < SINKS) | ((q - k).abs() < SPAN)) & mask.bool()[:, None, None, :]
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=additive(allowed)).last_hidden_state
        with foveate.use(model, PATTERN):
            ours = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert (expected - ours)[mask.bool()].abs().max() <= CLOSE


def test_whisper_encoder_and_cross_attention() -> None:
    model = tiny("whisper")
    sound, ids = torch.randn(2, 8, 60), tokens(2, 9)
    q, k = torch.arange(30)[:, None], torch.arange(30)[None]
    band = ((k < SINKS) | ((q - k).abs() < SPAN))[None, None].expand(2, 1, -1, -1)
    text = sink_window(9, torch.zeros(2, dtype=torch.int64))
    everything = torch.ones(2, 1, 9, 30, dtype=torch.bool)
    found = list(sites(model).values())
    assert [s.cross for s in found] == [False, False, False, True, False, True]
    masks = [
        band
        if "encoder.layers" in s.name and "decoder" not in s.name
        else (everything if s.cross else text)
        for s in found
    ]
    inputs = {"input_features": sound, "decoder_input_ids": ids}
    with masked_by(model, masks):
        expected = logits(model, **inputs)
    with foveate.use(model, PATTERN):
        ours = logits(model, **inputs)
    assert (expected - ours).abs().max() <= CLOSE
    by_path = Assignment({"model.encoder.layers.0": PATTERN, "model.encoder.layers.1": PATTERN})
    with foveate.use(model, by_path):
        part = logits(model, **inputs)
    assert (part - ours).abs().max() > 10 * CLOSE
    with foveate.use(model, PATTERN, cross=True):
        crossed = logits(model, **inputs)
    assert (crossed - ours).abs().max() > 10 * CLOSE


@pytest.mark.parametrize("pattern", ["a-shape(sinks=2, local=6)", "block-sparse(blocks=1, tile=8)"])
def test_other_patterns_run_everywhere(pattern: str) -> None:
    """Padded prefill, decoding, training: finite, and the mask is never left."""
    model, ids, mask = tiny("llama"), tokens(2, 40), padded(2, 40, "left")
    with foveate.use(model, pattern):
        base = logits(model, input_ids=ids, attention_mask=mask)
        assert base[mask.bool()].isfinite().all()
        # What padding holds changes nothing.
        other = ids.masked_fill(mask == 0, 5)
        again = logits(model, input_ids=other, attention_mask=mask)
        assert (base - again)[mask.bool()].abs().max() <= CLOSE
        out = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        assert out.shape == (2, 45)
        model.train()
        model(input_ids=ids, attention_mask=mask).logits.square().mean().backward()
        assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_context_tells_layer_phase_and_what_is_shared() -> None:
    heard: list[tuple[str, int, int]] = []
    model, ids = tiny("gemma3"), tokens(1, 12)

    from foveate.methods.full import Full
    from foveate.ops import AttentionOutput
    from foveate.parts import Context

    class Listening(Full):
        def __call__(
            self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
        ) -> AttentionOutput:
            assert ctx is not None
            heard.append((ctx.phase, ctx.layer, id(ctx.store)))
            ctx.store["layer"] = ctx.store.get("layer", -1) + 1
            assert ctx.store["layer"] == ctx.layer
            return super().__call__(q, k, v, ctx)

    with foveate.use(model, Listening()):
        model.generate(ids, max_new_tokens=3, do_sample=False)
        model.train()
        model(input_ids=ids)
    assert [(p, n) for p, n, _ in heard] == (
        [("prefill", n) for n in range(3)]
        + [("decode", n) for n in range(3)] * 2
        + [("train", n) for n in range(3)]
    )


def test_stats() -> None:
    model, ids = tiny("llama"), tokens(1, 12)
    heard: list[dict[str, Any]] = []
    with foveate.use(model, PATTERN, stats=lambda **said: heard.append(said)):
        logits(model, input_ids=ids)
    assert [said["layer"] for said in heard] == [0, 1, 2]
    expected = int(sink_window(12, torch.zeros(1, dtype=torch.int64)).sum())
    assert [said["layout"].pairs for said in heard] == [expected] * 3
    assert all(said["build_seconds"] >= 0 < said["attend_seconds"] for said in heard)
