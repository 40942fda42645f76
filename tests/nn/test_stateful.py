"""Attentions with a state or parameters of their own, in a layer and in a model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import foveate
from foveate import AttentionOutput, catalog, causal
from foveate.ops import padding
from foveate.ops.errors import FoveateError, InputError
from foveate.parts import Attention, AttentionRecipe, Heads, State, StateCache, Stateful
from foveate.parts.cache import Field


class RunningMean(Stateful):
    """The mean of the real values so far: the plainest attention whose state is a sum."""

    def __init__(self, heads: int, width: int) -> None:
        self.heads, self.width = heads, width

    def new_state(self):
        shape = (self.heads, 1, self.width)
        return State([Field("sum", "sequence", shape, 1), Field("count", "sequence", (1,), 1)])

    def full(self, q, k, v, ctx):
        return self.step(q, k, v, ctx, self.new_state())

    def step(self, q, k, v, ctx, state):
        real = v.new_ones(v.shape[0], v.shape[2]) if ctx.real is None else ctx.real.to(v.dtype)
        before = state.held or {"sum": v[:, :, :1] * 0, "count": real[:, :1] * 0}
        total = before["sum"] + (v * real[:, None, :, None]).cumsum(2)
        count = before["count"] + real.cumsum(1)
        state.held = {"sum": total[:, :, -1:], "count": count[:, -1:]}
        state.length += v.shape[2]
        mean = total / count.clamp(min=1)[:, None, :, None]
        out = mean.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return AttentionOutput(out, out.new_full(out.shape[:3], torch.nan))


@dataclass(frozen=True)
class Scaled(AttentionRecipe):
    """Dense attention with a learnt factor for each query head, to see what is built."""

    first: float = 2.0

    def build(self, heads):
        return ScaledAttention(heads, self.first)


class ScaledAttention(Attention, nn.Module):
    def __init__(self, heads: Heads, first: float) -> None:
        nn.Module.__init__(self)
        self.sizes = heads
        self.factor = nn.Parameter(torch.full((heads.query, 1, 1), first))

    def __call__(self, q, k, v, ctx=None):
        ctx.aux["factor_loss"] = self.factor.square().mean()
        out, lse = foveate.attention(q, k, v, ctx.mask)
        return AttentionOutput(out * self.factor, lse)


def layer(**more):
    return foveate.Attention(32, 4, "gqa(kv_heads=2)", RunningMean(2, 8), **more).eval()


@pytest.mark.parametrize("cuts", [(7,), (1, 1, 5), (4, 1, 1, 1)])
def test_steps_equal_the_full_forward(cuts):
    made, x = layer(), torch.randn(2, 7, 32)
    want = made(x, mask=causal()).y
    cache = made.new_cache()
    with torch.no_grad():
        found = [made(part, mask=causal(), cache=cache).y for part in x.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(found, 1), want)
    assert isinstance(cache, StateCache)
    assert len(cache) == 7
    assert cache.elements_per_token == 0
    assert cache.bytes() == 2 * (2 * 8 + 1) * 4


def test_padding_among_the_new_tokens_is_told():
    made, x = layer(position="none"), torch.randn(2, 7, 32)
    mask = causal() & padding([7, 4])
    at = torch.arange(7) - torch.tensor([0, 3])[:, None]
    ctx = foveate.Context(mask=mask, q_positions=at, kv_positions=at)
    got = made(x, ctx=ctx).y
    alone = made(x[1:, 3:], mask=causal()).y
    torch.testing.assert_close(got[1:, 3:], alone)
    cache = made.new_cache()
    with torch.no_grad():
        made(x[:, :5], ctx=foveate.Context(
            mask=causal() & padding([5, 2]), q_positions=at[:, :5], kv_positions=at[:, :5]
        ), cache=cache)  # fmt: skip
        last = made(
            x[:, 5:], ctx=foveate.Context(mask=mask, q_positions=at[:, 5:], kv_positions=at),
            cache=cache,
        ).y  # fmt: skip
    torch.testing.assert_close(last, got[:, 5:])


def test_a_state_follows_beams_and_forgets():
    made, x = layer(), torch.randn(2, 5, 32)
    cache = made.new_cache()
    with torch.no_grad():
        made(x[:, :4], mask=causal(), cache=cache)
        cache.reorder(torch.tensor([1, 1, 0]))
        got = made(x[:, 4:][[1, 1, 0]], mask=causal(), cache=cache).y
        want = made(x, mask=causal()).y[:, 4:][[1, 1, 0]]
    torch.testing.assert_close(got, want)
    with pytest.raises(InputError, match="none can be taken back"):
        cache.truncate(2)
    cache.truncate(0)
    assert len(cache) == 0
    assert cache.batch is None


def test_projections_that_cache_something_else_are_refused():
    with pytest.raises(InputError, match="MLA.*plain heads"):
        foveate.Attention(32, 4, "mla(latent=8, rope_dim=4)", RunningMean(4, 8))
    with pytest.raises(InputError, match="MFAKR.*plain heads"):
        foveate.Attention(32, 4, "mfa-kr", RunningMean(1, 8))


@pytest.mark.parametrize("attention", ["lucid(block=4)", "flowformer(chunk=4)", "tensor-attention"])
@pytest.mark.parametrize(
    "projection",
    ["sqa(query_heads=2, kv_heads=1)", "sqa(query_heads=2, kv_heads=4)", "moh(shared=1, active=2)"],
)
def test_heads_that_are_fewer_or_chosen_decode_as_they_train(projection, attention, monkeypatch):
    monkeypatch.setattr("foveate.methods.moh.projection.RAGGED_FROM", 4)
    made = foveate.Attention(32, 4, projection, attention).double().eval()
    x, at = torch.randn(2, 11, 32).double(), torch.arange(11) - torch.tensor([0, 3])[:, None]

    def call(low, high, cache=None):
        mask = causal() & padding([high, high - 3])
        ctx = foveate.Context(mask=mask, q_positions=at[:, low:high], kv_positions=at[:, :high])
        return made(x[:, low:high], ctx=ctx, cache=cache).y

    want, cache = call(0, 11), made.new_cache()
    with torch.no_grad():
        found = torch.cat([call(a, b, cache) for a, b in ((0, 5), (5, 6), (6, 11))], 1)
    real = at >= 0
    torch.testing.assert_close(found[real], want[real], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(want[1:, 3:], made(x[1:, 3:], mask=causal()).y)
    want[real].sum().backward()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)


def test_keys_that_are_no_tokens_are_refused():
    with pytest.raises(InputError, match="SQA.*plain heads"):
        foveate.Attention(32, 4, "sqa(global_tokens=2)", "lucid")


def test_a_cache_of_another_kind_is_refused():
    plain = foveate.Attention(32, 4)
    with pytest.raises(InputError, match="expected a StateCache"):
        layer()(torch.randn(1, 2, 32), cache=plain.new_cache())
    with pytest.raises(InputError, match="expected a TokenCache"):
        plain(torch.randn(1, 2, 32), cache=layer().new_cache())


def test_a_recipe_is_built_for_the_layers_heads():
    made = foveate.Attention(32, 4, "gqa(kv_heads=2)", Scaled(), head_dim=6, layer=3)
    assert made.attention.sizes == Heads(32, 4, 2, 6, 6, 3)
    assert "attention.factor" in dict(made.named_parameters())
    y, _, aux = made(torch.randn(1, 5, 32), mask=causal())
    assert set(aux) == {"factor_loss"}
    (y.sum() + aux["factor_loss"]).backward()
    assert made.attention.factor.grad.abs().min() > 0
    latent = foveate.Attention(32, 4, "mla(latent=8, rope_dim=4)", Scaled())
    assert latent.attention.sizes.query == 4
    assert latent.attention.sizes.value_dim == 8


def test_an_attention_is_told_the_layers_index():
    told = []

    class Told(Attention):
        def __call__(self, q, k, v, ctx=None):
            told.append(ctx.layer)
            return foveate.attention(q, k, v, ctx.mask)

    made, x = foveate.Attention(32, 4, attention=Told(), layer=3), torch.randn(1, 5, 32)
    made(x)
    made(x, ctx=foveate.Context(mask=causal()))
    made(x, ctx=foveate.Context(mask=causal(), layer=5))
    assert told == [3, 3, 5]


def stateful():
    """Every attention of the catalog that keeps a state, with its own defaults."""
    found = []
    for row in catalog.rows():
        try:
            made = foveate.Attention(32, 4, attention=row.key)
        except FoveateError:
            continue
        if isinstance(made.attention, Stateful):
            found.append(row.key)
    return found


@pytest.mark.parametrize("key", stateful())
def test_a_state_of_the_catalog_follows_beams_and_starts_again(key):
    made, x = foveate.Attention(32, 4, attention=key).eval(), torch.randn(3, 36, 32)
    cache, picked = made.new_cache(), torch.tensor([2, 0, 2])
    with torch.no_grad():
        cache.reorder(torch.tensor([0]))  # nothing is held yet
        made(x[:, :32], mask=causal(), cache=cache)
        cache.reorder(picked)
        bent = torch.cat((x[picked, :32], torch.randn(3, 4, 32)), 1)
        got = [
            made(part, mask=causal(), cache=cache).y for part in bent[:, 32:].split((1, 2, 1), 1)
        ]
        fresh = made.new_cache()
        made(bent[:, :32], mask=causal(), cache=fresh)
        want = [
            made(part, mask=causal(), cache=fresh).y for part in bent[:, 32:].split((1, 2, 1), 1)
        ]
        torch.testing.assert_close(torch.cat(got, 1), torch.cat(want, 1))
        assert (len(cache), cache.batch) == (36, 3)
        cache.reset()
        assert (len(cache), cache.bytes(), cache.batch) == (0, 0, None)
        fresh = made.new_cache()
        for part in x[:1, :7].split((6, 1), 1):
            again = made(part, mask=causal(), cache=cache).y
            first = made(part, mask=causal(), cache=fresh).y
            torch.testing.assert_close(again, first, rtol=0, atol=0)
        try:
            cache.truncate(6)
        except InputError:
            return
        again = made(x[:1, 6:7], mask=causal(), cache=cache).y
        torch.testing.assert_close(again, first)


def test_a_model_generates_from_states():
    pytest.importorskip("transformers")
    from foveate.models import FoveateConfig, FoveateForCausalLM

    model = FoveateForCausalLM(FoveateConfig(hidden_size=32, num_hidden_layers=2)).eval()
    for block in model.model.blocks:
        block.attention.attention = RunningMean(4, 8)
    ids = torch.randint(256, (2, 6))
    wanted = ids
    for _ in range(4):
        logits = model(wanted, use_cache=False).logits[:, -1]
        wanted = torch.cat((wanted, logits.argmax(-1, keepdim=True)), 1)
    got = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(got, wanted)
    model.generate(ids, max_new_tokens=3, num_beams=3, pad_token_id=0)
