"""Deconstructed attention in whole models: the spec's oracles on streams, counts and skipping."""

from __future__ import annotations

import pytest
import torch

from foveate import causal
from foveate.methods.deconstructing import VARIANTS, composed, indicators
from foveate.ops.errors import InputError
from foveate.parts import Context

transformers = pytest.importorskip("transformers")

from foveate.models import (  # noqa: E402
    FoveateConfig,
    FoveateForCausalLM,
    attention_maps,
    without_layers,
)

DIM, HEADS, LAYERS, VOCAB, LENGTH = 24, 4, 4, 53, 32
OPTIONS = {"rnd-emb-qk": "length=32, sigma=1.0", "fixed-seq-qk": "length=32"}


def config(**options) -> FoveateConfig:
    given = {
        "vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "initializer_range": 0.3,
    }  # fmt: skip
    return FoveateConfig(**(given | options))


def model(variant, ratio="uniform", options=None, dtype=torch.float64) -> FoveateForCausalLM:
    torch.manual_seed(0)
    given = OPTIONS.get(variant, "") if options is None else options
    made = FoveateForCausalLM(config(**composed(variant, LAYERS, ratio, given)))
    made = made.to(dtype).eval()
    if variant == "fixed-seq-qk":
        made.set_reference(ids(1, seed=7)[0])
    return made


def ids(batch=2, length=LENGTH, seed=1):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def with_weights_of(standard, other):
    """Give a model of mixers the weights of one of attentions, by the names of both."""
    held = {
        name.replace("attention.projection.", "attention.mixer."): x
        for name, x in standard.state_dict().items()
    }
    told = other.load_state_dict(held, strict=False)
    assert not told.unexpected_keys
    assert set(told.missing_keys) <= {"model.reference.start"}
    return other


def maps_of(lm, given):
    """What the layers' queries and keys are while the model runs: layer -> (q, k)."""
    found = {}
    hooks = [
        block.attention.mixer.register_forward_pre_hook(
            lambda _, args, i=i: found.__setitem__(i, args[1].reference.by_layer.get(i))
        )
        for i, block in enumerate(lm.model.blocks)
    ]
    with torch.no_grad():
        lm(given)
    for hook in hooks:
        hook.remove()
    return found


# -- oracle 3 --------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["rnd-emb-qk", "fixed-seq-qk"])
def test_oracle_3_maps_are_the_same_for_every_input(variant):
    lm = model(variant)
    before = maps_of(lm, ids())
    lm.model.reference._kept = None  # so that they are computed anew
    after = maps_of(lm, ids(seed=2).flip(0))
    for i in range(LAYERS):
        assert torch.equal(before[i][0], after[i][0])
        assert torch.equal(before[i][1], after[i][1])
    with torch.no_grad():
        out, turned = lm(ids()).logits, lm(ids().flip(0)).logits
    torch.testing.assert_close(turned.flip(0), out, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("variant", ["rnd-emb-qk", "fixed-seq-qk"])
def test_oracle_3_a_layer_is_linear_in_its_input(variant):
    lm = model(variant)
    maps = lm.model.reference.maps(lm.model, LENGTH, "prefill")
    layer = lm.model.layers[2].attention
    one, two = torch.randn(2, 3, LENGTH, DIM, dtype=torch.float64)

    def y(x):
        return layer(x, ctx=Context(mask=causal(), layer=2, reference=maps)).y

    torch.testing.assert_close(y(2 * one - 3 * two), 2 * y(one) - 3 * y(two))
    a = torch.softmax(
        (maps.by_layer[2][0] @ maps.by_layer[2][1].mT * (DIM // HEADS) ** -0.5).masked_fill(
            torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf
        ),
        -1,
    )
    v = layer.mixer.v(one).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    torch.testing.assert_close(y(one), layer.mixer.out((a @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("ratio", ["uniform", "even"])
def test_oracle_3_the_fixed_sequence_itself_is_standard_attention(ratio):
    standard, ours = model("standard"), model("fixed-seq-qk", ratio)
    if ratio == "even":
        held = {
            name.replace("projection.", "mixer.") if ".layers.0." in name or ".layers.2." in name
            else name: x
            for name, x in standard.state_dict().items()
        }  # fmt: skip
        assert not ours.load_state_dict(held, strict=False).unexpected_keys
    else:
        with_weights_of(standard, ours)
    sequence = ids(1, seed=7)
    with torch.no_grad():
        one = standard(sequence, output_hidden_states=True).hidden_states
        two = ours(sequence, output_hidden_states=True).hidden_states
        other = ours(ids(1)).logits
        differs = standard(ids(1)).logits
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(other, differs, atol=1e-2)


# -- oracle 4 --------------------------------------------------------------------------------------
def test_oracle_4_static_is_standard_in_the_first_layer():
    standard, ours = model("standard"), model("static-emb-qk")
    with_weights_of(standard, ours)
    with torch.no_grad():
        for block in (*standard.model.blocks, *ours.model.blocks):
            block.attention_norm.weight.normal_(generator=torch.Generator().manual_seed(4))
        one = standard(ids(), output_hidden_states=True).hidden_states
        two = ours(ids(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(one[1], two[1])
    assert not torch.allclose(one[2], two[2], atol=1e-2)


@pytest.mark.parametrize("norm", ["input", "layer", "none"])
def test_oracle_4_static_maps_do_not_depend_on_deeper_states(norm):
    lm = model("static-emb-qk", options=f"norm={norm!r}")
    found = []
    for block in lm.model.blocks:
        block.attention.mixer.k.register_forward_hook(lambda *args: found.append(args[2]))
    with torch.no_grad():
        lm(ids())
        lm.model.layers[0].feedforward.down.weight.mul_(3)
        lm(ids())
    for before, after in zip(found[:LAYERS], found[LAYERS:]):
        assert torch.equal(before, after)


# -- oracle 5 --------------------------------------------------------------------------------------
def test_oracle_5_without_mixing_no_position_sees_another():
    lm, given = model("mlp"), ids()
    other = given.clone()
    other[:, :20] = ids(seed=3)[:, :20]
    other[:, 21:] = ids(seed=3)[:, 21:]
    with torch.no_grad():
        one, two = lm(given).logits, lm(other).logits
    torch.testing.assert_close(one[:, 20], two[:, 20])
    with torch.no_grad():  # the same loss of each token, whatever the context
        short = lm(given[:, 20:24]).logits
    torch.testing.assert_close(short, one[:, 20:24])


# -- oracle 6 --------------------------------------------------------------------------------------
def test_oracle_6_parameters_are_alike():
    counts = {variant: sum(p.numel() for p in model(variant).parameters()) for variant in VARIANTS}
    width = round(4 * DIM / 3)
    rounding = LAYERS * (3 * DIM * width - 4 * DIM * DIM)
    assert counts.pop("mlp") == counts["standard"] + rounding
    assert set(counts.values()) == {counts["standard"]}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "standard"])
def test_oracle_6_skipping_is_the_model_with_those_layers_deleted(variant, tmp_path):
    lm = model(variant, "even")
    skipped = without_layers(lm, (0, 2))
    with torch.no_grad():
        x = lm.model.embed_tokens(ids())
        for i in (1, 3):
            x = lm.model.layers[i](x, Context(mask=causal(), layer=i)).y
        expected = lm.lm_head(lm.model.norm(x))
        torch.testing.assert_close(skipped(ids()).logits, expected)
    assert skipped.model.reference is None
    skipped.save_pretrained(tmp_path)
    again = FoveateForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(ids()).logits, skipped(ids()).logits)
    assert lm.config.num_hidden_layers == LAYERS
    with pytest.raises(InputError, match="some, not all"):
        without_layers(lm, range(LAYERS))


# -- decoding and the second stream ----------------------------------------------------------------
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "standard"])
@pytest.mark.parametrize("ratio", ["uniform", "even"])
def test_decoding_equals_the_full_forward(variant, ratio):
    lm, given = model(variant, ratio), ids()
    with torch.no_grad():
        want = lm(given, use_cache=False).logits
        cache = lm.new_cache()
        parts = [lm(p, past_key_values=cache).logits for p in given.split([9, 1, 1, 5, 16], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "standard"])
def test_left_padding_and_beams(variant):
    lm = model(variant, "even")
    given = ids(length=14)
    mask = torch.ones_like(given)
    mask[1, :5] = 0
    plain = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    out = lm.generate(given, attention_mask=mask, **plain)
    alone = lm.generate(given[1:, 5:], **plain)
    assert torch.equal(out[1:, 5:], alone)
    beams = lm.generate(given, num_beams=2, **plain)
    assert torch.equal(beams, lm.generate(given, num_beams=2, use_cache=False, **plain))


def test_maps_are_kept_until_a_weight_changes():
    lm = model("rnd-emb-qk")
    runs = [0]
    lm.model.layers[1].attention.mixer.q.register_forward_hook(
        lambda *_: runs.__setitem__(0, runs[0] + 1)
    )
    with torch.no_grad():
        for length in (3, 8, LENGTH):
            lm(ids(length=length))
        assert runs == [1]
        before = lm(ids()).logits
        lm.model.layers[0].attention.mixer.v.weight.mul_(1.5)
        after = lm(ids()).logits
        assert runs == [2]
    assert not torch.allclose(before, after)
    fresh = model("rnd-emb-qk")
    fresh.load_state_dict(lm.state_dict())
    assert torch.equal(fresh(ids()).logits, after)
    lm.train()
    lm(ids())
    assert runs == [3]


def test_maps_are_made_anew_where_torch_counts_no_change():
    lm = model("rnd-emb-qk", dtype=torch.float32)

    def looks_anew(change):
        with torch.no_grad():
            lm(ids())
            change()
            got = lm(ids()).logits
            lm.model.reference._kept = None
            assert torch.equal(got, lm(ids()).logits)

    looks_anew(lambda: [p.data.mul_(1.3) for p in lm.parameters()])  # averaged weights, say
    for layer in lm.model.layers:  # one weight, and the last of an odd number
        layer.attention_norm.weight.data = torch.randn(DIM + 2)[1:-1]
        looks_anew(lambda w=layer.attention_norm.weight: w.data[-1].mul_(-3))
    looks_anew(lambda: lm.load_state_dict(
        {"model.reference.start": torch.randn(32, DIM)}, strict=False))  # fmt: skip
    fused = torch.optim.AdamW(lm.parameters(), lr=0.1, fused=True)
    lm(ids(), labels=ids()).loss.backward()
    looks_anew(fused.step)


def test_only_values_are_cached_for_each_sequence():
    lm = model("rnd-emb-qk", dtype=torch.float32)
    cache = lm.new_cache()
    with torch.no_grad():
        lm(ids(), past_key_values=cache)
    assert cache.bytes() == LAYERS * 2 * LENGTH * DIM * 4
    with torch.no_grad():
        shared = lm.model.reference.maps(lm.model, LENGTH, "decode")
    assert shared.bytes() == LAYERS * 2 * LENGTH * DIM * 4  # queries and keys, for any batch


def test_gradients_flow_through_the_second_stream():
    lm = model("fixed-seq-qk").train()
    lm(ids(), labels=ids()).loss.backward()
    only = torch.zeros(VOCAB, dtype=torch.bool)
    only[ids(1, seed=7)[0]] = True
    only[ids()] = False
    assert only.any()
    grad = lm.model.embed_tokens.weight.grad
    assert (grad[only].abs().sum(-1) > 0).all()


def test_reference_streams_refuse():
    lm = model("rnd-emb-qk")
    with pytest.raises(InputError, match="has 32 positions"):
        lm(ids(length=33))
    with pytest.raises(InputError, match="stream is random"):
        lm.set_reference(ids(1)[0])
    fixed = FoveateForCausalLM(config(**composed("fixed-seq-qk", LAYERS, "uniform", "length=32")))
    with pytest.raises(InputError, match=r"model.set_reference"):
        fixed(ids())
    with pytest.raises(InputError, match="at least 32 token ids"):
        fixed.set_reference(ids(1, 31)[0])
    with pytest.raises(InputError, match="0 to 52"):
        fixed.set_reference(ids(1)[0] + VOCAB)
    with pytest.raises(InputError, match="no mixer of this model"):
        model("mlp").set_reference(ids(1)[0])
    with pytest.raises(InputError, match="different reference streams"):
        FoveateForCausalLM(config(mixer=["rnd-emb-qk", "rnd-emb-qk(seed=1)", None, None]))
    with pytest.raises(InputError, match="kv_heads=3"):
        FoveateForCausalLM(config(mixer="static-emb-qk(kv_heads=3)"))


@pytest.mark.parametrize(
    "mixer", ["static-emb-qk(kv_heads=2)", "rnd-emb-qk(kv_heads=2, length=32)"]
)
def test_grouped_heads_are_repeated_heads(mixer):
    torch.manual_seed(0)
    grouped = FoveateForCausalLM(config(mixer=mixer)).double().eval()
    whole = (
        FoveateForCausalLM(config(mixer=mixer.replace("kv_heads=2", "kv_heads=4"))).double().eval()
    )
    held = dict(grouped.state_dict())
    for name in list(held):
        if "mixer.k" in name or "mixer.v" in name:
            rows = held[name].unflatten(0, (2, 1, -1))
            held[name] = rows.expand(-1, 2, -1, -1).flatten(0, 2)
    whole.load_state_dict(held)
    with torch.no_grad():
        torch.testing.assert_close(whole(ids()).logits, grouped(ids()).logits)


# -- looking at the maps ---------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_maps_are_what_the_layers_weigh_by(variant):
    lm, given = model(variant, "even"), ids()
    with torch.no_grad():
        before = lm(given).logits
        states = lm(given, output_hidden_states=True).hidden_states
    maps = attention_maps(lm, given)
    assert torch.equal(lm(given).logits, before)  # the model is as it was
    lower = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    for i, a in enumerate(maps):
        if variant == "mlp" and i % 2 == 0:
            assert a is None
            continue
        assert a.shape == (1 if variant in OPTIONS and i % 2 == 0 else 2, HEADS, LENGTH, LENGTH)
        assert not a[..., ~lower].any()
        torch.testing.assert_close(a.sum(-1), torch.ones_like(a[..., 0]))
        assert indicators(a).entropy.min() > 0
        layer = lm.model.layers[i].attention
        maps_to = getattr(layer, "mixer", None) or layer.projection
        with torch.no_grad():
            h = lm.model.layers[i].attention_norm(states[i])
            v = maps_to.v(h).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            y = maps_to.out((a @ v).transpose(1, 2).flatten(2))
            x = states[i] + y
            x = x + lm.model.layers[i].feedforward(lm.model.layers[i].feedforward_norm(x))
        if i < LAYERS - 1:
            torch.testing.assert_close(x, states[i + 1])
