"""Policies that drop keys, under transformers' own generation.

The oracle keeps the whole cache and hides what a policy drops: plain attention in float64 with a
table of what each head still sees, chosen by sorting in Python.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from tiny_models import FULL, SIZES, padded, tiny, tokens
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask

import foveate
from foveate.hf import AssignmentError, ModelError
from foveate.hf.eviction import EvictingLayer
from foveate.methods import make
from foveate.ops.errors import InputError

CLOSE = 2e-4
SNAP = "snapkv(budget=20, window=6, kernel=3)"
HEAVY = "h2o(heavy=9, recent=7)"


class Plain:
    """A policy as a table of what each layer's heads still see; its whole cache stays."""

    def __init__(self, method: Any, pads: list[int]) -> None:
        self.method, self.pads = method, pads
        self.alive: dict[int, Tensor] = {}
        self.score: dict[int, Tensor] = {}

    def __call__(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any
    ) -> tuple[Tensor, None]:
        layer, new, seen = module.layer_idx, q.shape[2], k.shape[2]
        batch, kv_heads = k.shape[:2]
        group = q.shape[1] // kv_heads
        alive = torch.zeros(batch, kv_heads, seen, dtype=torch.bool)
        score = torch.zeros(batch, kv_heads, seen)
        before = seen - new
        if before:
            alive[..., :before], score[..., :before] = self.alive[layer], self.score[layer]
        for b, pads in enumerate(self.pads):
            alive[b, :, max(before, pads) :] = True
        own = torch.arange(before, seen)
        causal = torch.arange(seen) <= own[:, None]
        allowed = (alive[:, :, None] & causal).repeat_interleave(group, 1)
        s = (q.double() @ k.double().repeat_interleave(group, 1).mT) * more["scaling"]
        if more.get("softcap"):
            s = more["softcap"] * torch.tanh(s / more["softcap"])
        weights = torch.softmax(s.masked_fill(~allowed, -torch.inf), -1).nan_to_num(0.0)
        out = weights @ v.double().repeat_interleave(group, 1)
        shared = weights.unflatten(1, (kv_heads, group)).mean(2)
        score += shared.sum(2)
        for b in range(batch):
            for h in range(kv_heads):
                self._drop(alive[b, h], score[b, h], shared[b, h], seen, new, self.pads[b])
        self.alive[layer], self.score[layer] = alive, score
        return out.to(q.dtype).transpose(1, 2).contiguous(), None

    def _drop(
        self, alive: Tensor, score: Tensor, rows: Tensor, seen: int, new: int, pads: int
    ) -> None:
        held = alive.nonzero()[:, 0].tolist()
        m = self.method
        if hasattr(m, "heavy"):
            forced = {j for j in held if j >= seen - m.recent or j < pads + m.sinks}
            size, value = m.heavy + m.recent, score.tolist()
        else:
            if new == 1:
                return
            received = rows[-m.window :].sum(0)
            before = [j for j in held if j < seen - m.window]
            half = m.kernel // 2
            value = {}
            for i, j in enumerate(before):
                near = [float(received[before[n]]) for n in range(i - half, i + half + 1)
                        if 0 <= n < len(before)]  # fmt: skip
                value[j] = max(near) if m.pooling == "max" else sum(near) / m.kernel
            forced = {j for j in held if j >= seen - m.window or j < pads + m.sinks}
            size = m.budget
        if len(held) <= size:
            return
        best = sorted((j for j in held if j not in forced), key=lambda j: -value[j])
        kept = forced | set(best[: size - len(forced)])
        for j in held:
            alive[j] = j in kept


def feed(model: PreTrainedModel, ids: Tensor, mask: Tensor, chunks: list[int]) -> tuple[Any, Any]:
    """The last logits of each chunk, and the cache."""
    cache, at, out = DynamicCache(config=model.config), 0, []
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for size in chunks:
        with torch.no_grad():
            made = model(
                input_ids=ids[:, at : at + size], attention_mask=mask[:, : at + size],
                position_ids=places[:, at : at + size], past_key_values=cache, use_cache=True,
            )  # fmt: skip
        out.append(made.logits[:, -1])
        at += size
    return torch.stack(out), cache


def plain(model: PreTrainedModel, text: str, ids: Tensor, mask: Tensor, chunks: list[int]) -> Any:
    AttentionInterface.register("plain_policy", Plain(make(text), (mask == 0).sum(1).tolist()))
    AttentionMaskInterface.register("plain_policy", eager_mask)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("plain_policy")
        return feed(model, ids, mask, chunks)[0]
    finally:
        model.set_attn_implementation(before)


CHUNKS = {
    "prompt": [40] + [1] * 12,
    "two turns": [30, 1, 1, 1, 9, 1, 1, 2, 1, 1],
    "token by token": [1] * 40,
}


@pytest.mark.parametrize("chunks", sorted(CHUNKS))
@pytest.mark.parametrize(
    "text",
    [SNAP, "snapkv(budget=20, window=4, kernel=5, pooling='max', sinks=3)", HEAVY,
     "h2o(heavy=8, recent=1, sinks=2)"],
)  # fmt: skip
def test_each_step_equals_plain_attention_over_what_a_policy_keeps(text, chunks):
    model = tiny("llama").double()
    sizes = CHUNKS[chunks]
    ids, mask = tokens(3, sum(sizes)), padded(3, sum(sizes), "left")
    expected = plain(model, text, ids, mask, sizes)
    with foveate.use(model, text):
        ours, cache = feed(model, ids, mask, sizes)
    # Scores are kept in fp32, so that only a tie within 1e-7 could be broken in another way.
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    with foveate.use(model, "full"):  # eager attention in float64 makes NaN of padded rows
        dense = feed(model, ids, mask, sizes)[0]
    if chunks != "token by token" or "h2o" in text:
        assert (ours - dense).abs().max() > 1e-2
        assert all(layer.cache.evicted for layer in cache.layers)


def test_softcap_enters_the_scores():
    sizes = SIZES | {"layer_types": ["full_attention"] * 3, "attn_logit_softcapping": 2.0}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes)).eval().double()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    sizes = [40] + [1] * 8
    ids, mask = tokens(2, 48), padded(2, 48, "left")
    for text in (SNAP, HEAVY):
        expected = plain(model, text, ids, mask, sizes)
        with foveate.use(model, text):
            ours, _ = feed(model, ids, mask, sizes)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize(
    "text", ["snapkv(budget=60)", "h2o(heavy=30, recent=30)", "h2o(heavy=0, recent=60)"]
)
def test_oracle_7_a_full_budget_is_dense(family, text):
    model = tiny(family)
    ids, mask = tokens(3, 60), padded(3, 60, "left")
    sizes = [33, 7] + [1] * 20
    dense, whole = feed(model, ids, mask, sizes)
    with foveate.use(model, text):
        ours, cache = feed(model, ids, mask, sizes)
        torch.testing.assert_close(ours, dense, atol=CLOSE, rtol=CLOSE)
        kept = cache.layers[0].cache
        assert (len(kept), kept.evicted) == (60, 0)
        more = [60 - 10, 10]
        cut = feed(model, ids, mask, more)[1]
        cut.crop(-10)
        assert cut.get_seq_length() == 50
    torch.testing.assert_close(kept.update(*[whole.layers[0].keys[:, :, :1]] * 2)[0][:, :, :60],
                               whole.layers[0].keys)  # fmt: skip


@pytest.mark.parametrize(("text", "kept"), [(SNAP, 20 + 12), (HEAVY, 16)])
def test_memory_falls_to_what_is_kept(text, kept):
    model = tiny("llama")
    ids = tokens(2, 400)
    with torch.no_grad():
        whole = model.generate(ids, max_new_tokens=13, return_dict_in_generate=True)
    full = sum(x.numel() * x.element_size() for layer in whole.past_key_values.layers
               for x in (layer.keys, layer.values))  # fmt: skip
    with foveate.use(model, text):
        ours = model.generate(ids, max_new_tokens=13, return_dict_in_generate=True)
    layers = ours.past_key_values.layers
    assert {len(layer.cache) for layer in layers} == {kept}
    held = sum(x.untyped_storage().nbytes() for layer in layers
               for x in layer.cache._held.values())  # fmt: skip
    assert held == sum(layer.bytes() for layer in layers)
    # Beside 16 + 16 numbers of a key head's token lie its position and its score; and the room.
    assert held <= full / 412 * (kept + 8) * (34 / 32)
    assert ours.past_key_values.get_seq_length() == 412


def test_rows_of_a_padded_batch_are_as_if_alone():
    model = tiny("llama")
    ids, mask = tokens(3, 60), padded(3, 60, "left")
    for text in (SNAP, HEAVY, "h2o(heavy=30, recent=28)"):
        with foveate.use(model, text):
            ours = model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False)
            for b in range(3):
                own = ids[b : b + 1][:, mask[b].bool()]
                alone = model.generate(own, max_new_tokens=14, do_sample=False)
                assert torch.equal(alone[0, -14:], ours[b, -14:])


def test_layers_may_differ_and_other_layers_keep_all():
    model = tiny("llama")
    ids, mask = tokens(2, 50), padded(2, 50, "left")
    sizes = [40] + [1] * 10
    dense = feed(model, ids, mask, sizes)[0]
    plan = foveate.hf.Assignment({0: "snapkv(budget=12, window=4)", 2: "h2o(heavy=100, recent=9)"})
    with foveate.use(model, plan):
        ours, cache = feed(model, ids, mask, sizes)
    assert [layer.get_mask_sizes(1)[0] - 1 for layer in cache.layers] == [22, 50, 50]
    assert (ours[0] - dense[0]).abs().max() <= CLOSE < (ours[-1] - dense[-1]).abs().max()
    # Only the first layer differs: with it at a full budget the rest is dense.
    with foveate.use(model, foveate.hf.Assignment({2: "h2o(heavy=41, recent=9)", 0: "full"})):
        ours, _ = feed(model, ids, mask, sizes)
    torch.testing.assert_close(ours, dense, atol=CLOSE, rtol=CLOSE)


def test_sliding_layers_keep_the_models_own_cache():
    model = tiny("gemma3")
    ids, mask = tokens(1, 50), padded(1, 50, "left")
    with foveate.use(model, SNAP):
        _, cache = feed(model, ids, mask, [40] + [1] * 10)
    kinds = [isinstance(layer, EvictingLayer) for layer in cache.layers]
    assert kinds == [False, True, False]
    assert len(cache.layers[1].cache) == 30


def test_learned_sinks_take_their_share():
    """Scores are weights after the sink logit, which no key receives."""
    model = tiny("gpt_oss")
    ids, mask = tokens(1, 40), padded(1, 40, "left")
    with foveate.use(model, "h2o(heavy=30, recent=20)"):
        _, cache = feed(model, ids, mask, [40])
    got = float(cache.layers[1].cache.scores.sum(-1).max())
    assert 0 < got < 40 - 1e-3


@pytest.mark.parametrize("text", [SNAP, HEAVY])
def test_beams_are_reordered_with_their_scores(text):
    model = tiny("llama").double()
    ids, mask = tokens(2, 40), padded(2, 40, "left")
    with foveate.use(model, text):
        _, cache = feed(model, ids, mask, [36, 1, 1, 1, 1])
        rows = torch.tensor([1, 1, 0])
        cache.reorder_cache(rows)
        kept = cache.layers[0].cache
        assert kept.pads.tolist() == [4, 4, 0]
        step = {"input_ids": tokens(3, 1), "attention_mask": mask[rows].new_ones(3, 41)}
        step["attention_mask"][:, :40] = mask[rows]
        with torch.no_grad():
            model(**step, past_key_values=cache)
        made = model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=6)
    assert made.shape[1] == 46


def test_a_cache_outlives_its_use_and_is_taken_up_again():
    model = tiny("llama")
    ids = tokens(1, 60)
    with foveate.use(model, HEAVY), torch.no_grad():
        cache = model(ids[:, :40], use_cache=True).past_key_values
    with torch.no_grad():
        model(ids[:, 40:44], past_key_values=cache)
    assert len(cache.layers[0].cache) == 20
    with foveate.use(model, HEAVY), torch.no_grad():
        model(ids[:, 44:45], past_key_values=cache)
        assert len(cache.layers[0].cache) == 16
        before = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=before)
    with foveate.use(model, SNAP), torch.no_grad():
        model(ids[:, 30:40], past_key_values=before)
    assert (len(before.layers[0].cache), before.get_seq_length()) == (20, 40)


def test_undo_copies_and_pickles_leave_nothing_behind():
    model = tiny("llama")
    before = {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    used = foveate.use(model, SNAP)
    other = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    used.undo()
    assert before == {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    for one in (other, again):
        one.set_attn_implementation("sdpa")
        with torch.no_grad():
            cache = one(tokens(1, 40), use_cache=True).past_key_values
        assert not isinstance(cache.layers[0], EvictingLayer)


def test_what_cant_be_is_refused():
    model = tiny("llama")
    with pytest.raises(AssignmentError, match="whole layer"):
        foveate.use(model, foveate.hf.Assignment({0: {"0-1": SNAP}}))
    with foveate.use(model, SNAP):
        with pytest.raises(InputError, match="on the left"), torch.no_grad():
            model(tokens(2, 40), attention_mask=padded(2, 40, "right"), use_cache=True)
        with pytest.raises(ModelError, match="dynamic cache"):
            model.generate(tokens(1, 8), cache_implementation="static", max_new_tokens=2)
        with torch.no_grad():
            cache = model(tokens(1, 40), use_cache=True).past_key_values
        with pytest.raises(InputError, match="dropped"):
            cache.crop(-1)
    with pytest.raises(ModelError, match="encoder"):
        foveate.use(tiny("whisper"), SNAP)


def test_training_and_calls_without_a_cache_are_dense():
    model = tiny("llama")
    ids = tokens(2, 50)
    dense = model(ids, use_cache=False).logits
    with foveate.use(model, SNAP):
        model.train()
        ours = model(ids, use_cache=False).logits
        ours.sum().backward()
    torch.testing.assert_close(ours, dense, atol=CLOSE, rtol=CLOSE)
    assert math.isfinite(float(next(model.parameters()).grad.sum()))
