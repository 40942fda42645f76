"""Dynamic mask attention in a layer and in a model: decoding from a cache of w keys."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate import causal, padding
from foveate.methods.dma import DMA
from foveate.ops.errors import InputError


def layer(attention="dma(window=12)", projection="gqa(kv_heads=2)", **more):
    made = foveate.Attention(32, 4, projection, attention, **more).eval()
    with torch.no_grad():
        made.attention.importance.A.normal_()
    return made


@pytest.mark.parametrize("projection", ["mha", "gqa(kv_heads=2)", "mqa", "mfa(head_dim=8)"])
@pytest.mark.parametrize("cuts", [(1,) * 40, (15, 1, 1, 23)])
def test_decoding_equals_the_full_forward_from_a_bounded_cache(projection, cuts):
    made, x = layer(projection=projection), torch.randn(2, 40, 32)
    want = made(x, mask=causal()).y
    cache = made.new_cache()
    with torch.no_grad():
        got = [made(part, mask=causal(), cache=cache).y for part in x.split(cuts, 1)]
        torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-5)
        before = cache.bytes()
        made(x, mask=causal(), cache=cache)
    assert (cache.bytes(), len(cache)) == (before, 80)


@pytest.mark.parametrize("attention", ["dma(window=6)", "dma(window=9, smooth=4, form='log')"])
def test_padding_in_front_changes_nothing_when_decoding(attention):
    made, x = layer(attention), torch.randn(2, 20, 32)
    at = torch.arange(20) - torch.tensor([[0], [8]])
    alone = made(x[1:, 8:], mask=causal()).y
    cache = made.new_cache()
    with torch.no_grad():
        got = []
        for start, stop in ((0, 11), (11, 12), (12, 13), (13, 20)):
            ctx = foveate.Context(
                mask=causal() & padding([stop, stop - 8]),
                q_positions=at[:, start:stop],
                kv_positions=at[:, :stop],
            )
            got.append(made(x[:, start:stop], ctx=ctx, cache=cache).y)
    torch.testing.assert_close(torch.cat(got, 1)[1:, 8:], alone)


def test_beams_go_on_from_the_rows_they_came_from():
    made, x = layer(), torch.randn(2, 30, 32)
    cache = made.new_cache()
    rows = torch.tensor([1, 1, 0])
    with torch.no_grad():
        made(x[:, :20], mask=causal(), cache=cache)
        made(x[:, 20:21], mask=causal(), cache=cache)
        cache.reorder(rows)
        got = torch.cat(
            [made(p, mask=causal(), cache=cache).y for p in x[rows, 21:].split(1, 1)], 1
        )
    torch.testing.assert_close(got, made(x, mask=causal()).y[rows, 21:])


def test_training_reaches_every_weight():
    made, x = layer().train(), torch.randn(2, 40, 32)
    made(x, mask=causal()).y.square().sum().backward()
    for name, weight in made.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


def test_a_bias_for_each_position_is_refused_when_decoding():
    made = layer()
    ctx = foveate.Context(mask=causal(), bias=torch.zeros(3, 3))
    with pytest.raises(InputError, match="keys are dropped"):
        made(torch.randn(1, 3, 32), ctx=ctx, cache=made.new_cache())
    with pytest.raises(InputError, match="plain heads"):
        foveate.Attention(32, 4, "mla(latent=8, rope_dim=4)", DMA())


def test_a_model_trains_saves_and_generates(tmp_path):
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    from foveate.models import FoveateConfig, FoveateForCausalLM

    model = FoveateForCausalLM(
        FoveateConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection="gqa(kv_heads=2)",
            attention="dma(window=8, form='log')",
        )  # fmt: skip
    )
    for block in model.model.blocks:
        assert (block.attention.attention.importance.A == 0).all()
        block.attention.attention.importance.A.data.normal_()
    ids = torch.randint(256, (2, 20))
    model.train()(ids, labels=ids).loss.backward()
    model.eval().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    wanted = ids
    for _ in range(5):
        logits = model(wanted, use_cache=False).logits[:, -1]
        wanted = torch.cat((wanted, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), wanted)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.int64), ids), 1)
    seen = torch.cat((torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(ids)), 1)
    got = model.generate(padded, attention_mask=seen, max_new_tokens=5, do_sample=False)
    assert torch.equal(got[:, 3:], wanted)
    model.generate(ids, max_new_tokens=4, num_beams=3)
