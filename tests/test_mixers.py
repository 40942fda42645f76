"""What every mixer of the catalog must do, in a model, and that its row's capabilities are true."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from foveate import catalog, causal, documents, padding
from foveate.methods import make
from foveate.methods.naming import make_attention
from foveate.nn import MixerLayer
from foveate.ops.errors import InputError
from foveate.parts import Context
from foveate.parts.mixer import MixerRecipe
from foveate.parts.reference import Maps

transformers = pytest.importorskip("transformers")

from foveate.models import FoveateConfig, FoveateForCausalLM  # noqa: E402

# Sizes small enough for these models; dropout off, so that calls can be compared.
SMALL = {
    "gaam": "gaam(form='density', heads=2)",
    "grassmann": "grassmann(rank=4, offsets=(1, 2, 5), dropout=0.0)",
    "rnd-emb-qk": "rnd-emb-qk(length=64, sigma=1.0)",
    "fixed-seq-qk": "fixed-seq-qk(length=64)",
}
MIXERS = [row for row in catalog.rows() if row.kind == "mixer"]
KEYS = [row.key for row in MIXERS]
LAYERS, DIM, VOCAB = 3, 16, 61


def mixers(capability: str) -> pytest.MarkDecorator:
    rows = [r for r in MIXERS if getattr(r.capabilities, capability).works]
    return pytest.mark.parametrize("key", [row.key for row in rows])


def test_all_work_everywhere():
    """A mixer that refuses something needs a test here that it does."""
    for row in MIXERS:
        for name in ("prefill", "decode", "backward", "padding", "bidirectional"):
            assert getattr(row.capabilities, name).works, (row.key, name)


def spec(key: str) -> str:
    return SMALL.get(key, key)


def model(mixer, dtype=torch.float64, **options) -> FoveateForCausalLM:
    """A model with weights large enough that nothing is lost in rounding."""
    given = {
        "vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "initializer_range": 0.3, "mixer": mixer,
    }  # fmt: skip
    torch.manual_seed(0)
    made = FoveateForCausalLM(FoveateConfig(**(given | options))).to(dtype).eval()
    stream = made.model.reference
    if stream is not None and stream.reference.kind == "tokens":
        made.set_reference(ids(64, 1, seed=9)[0])
    return made


def ids(length=21, batch=2, seed=1):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(lm, given, new=6):
    with torch.no_grad():
        for _ in range(new):
            given = torch.cat((given, lm(given, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return given


@pytest.mark.parametrize("key", KEYS)
def test_it_is_built_from_its_text(key):
    recipe = make(spec(key))
    assert isinstance(recipe, MixerRecipe)
    lm = model(spec(key))
    layer = lm.model.layers[0].attention
    assert isinstance(layer, MixerLayer)
    assert lm(ids()).logits.shape == (2, 21, VOCAB)
    assert lm(ids()).logits.std() > 0.01


@pytest.mark.parametrize("key", KEYS)
def test_a_trained_model_has_no_place_for_it(key):
    with pytest.raises(InputError, match="is a mixer"):
        make_attention(key)


@pytest.mark.parametrize("key", KEYS)
def test_outputs_do_not_see_later_tokens(key):
    lm, given = model(spec(key)), ids()
    other = given.clone()
    other[:, 13:] = ids(seed=2)[:, 13:]
    with torch.no_grad():
        before, after = lm(given).logits, lm(other).logits
    torch.testing.assert_close(before[:, :13], after[:, :13])
    assert not torch.allclose(before[:, 13:], after[:, 13:])


@mixers("decode")
@pytest.mark.parametrize("cuts", [(21,), (1,) * 21, (8, 3, 1, 9)])
def test_steps_equal_the_full_forward(key, cuts):
    lm, given = model(spec(key)), ids()
    with torch.no_grad():
        want = lm(given, use_cache=False).logits
        cache = lm.new_cache()
        parts = [lm(part, past_key_values=cache).logits for part in given.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want)
    assert cache.get_seq_length() == 21


@mixers("decode")
def test_generate_and_beams(key):
    lm, given = model(spec(key), torch.float32), ids(9)
    plain = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(lm.generate(given, **plain), greedy(lm, given))
    with_cache = lm.generate(given, num_beams=3, **plain)
    assert torch.equal(with_cache, lm.generate(given, num_beams=3, use_cache=False, **plain))
    assert lm.generate(given, num_return_sequences=2, num_beams=2, **plain).shape == (4, 15)


@mixers("decode")
def test_the_state_is_what_it_declares(key):
    lm = model(spec(key), torch.float32)
    sizes = []
    for length in (21, 42):
        cache = lm.new_cache()
        with torch.no_grad():
            lm(ids(length), past_key_values=cache)
        held = cache.layers[0].held
        sizes.append(held.bytes())
        declared = 0
        for field in held.fields:
            count = 1
            for size in field.shape:
                count *= size
            tokens = length if field.unit == "token" else min(length, field.limit)
            declared += 2 * 4 * count * tokens
        assert held.bytes() == declared
    assert sizes[1] - sizes[0] == 2 * 4 * 21 * held.elements_per_token
    cache.reset()
    assert cache.get_seq_length() == 0


@mixers("padding")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_read(key, side):
    lm, given = model(spec(key)), ids()
    mask = torch.ones_like(given)
    real = slice(7, None) if side == "left" else slice(None, 14)
    mask[1] = 0
    mask[1, real] = 1
    with torch.no_grad():
        out = lm(given, attention_mask=mask).logits
        torch.testing.assert_close(out[1:, real], lm(given[1:, real]).logits)
        torch.testing.assert_close(out[:1], lm(given[:1]).logits)
    assert out.isfinite().all()


@mixers("decode")
def test_left_padding_while_decoding(key):
    lm, given = model(spec(key)), ids()
    mask = torch.ones_like(given)
    mask[1, :7] = 0
    cache = lm.new_cache()
    with torch.no_grad():
        want = lm(given[1:, 7:]).logits
        parts = []
        for low, high in ((0, 9), (9, 10), (10, 21)):
            parts.append(
                lm(given[:, low:high], attention_mask=mask[:, :high], past_key_values=cache).logits
            )
    torch.testing.assert_close(torch.cat(parts, 1)[1:, 7:], want)


@mixers("backward")
def test_backward_is_the_finite_difference(key):
    lm, given = model(spec(key)).train(), ids(9)

    def loss():  # in float64, unlike transformers'
        logits = lm(given).logits
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), given[:, 1:].flatten())

    loss().backward()
    names = dict(lm.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in names.values())
    for name, parameter in names.items():
        if ".attention." not in name and "embed" not in name:
            continue
        direction = torch.randn_like(parameter)
        step = 1e-5
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                losses.append(float(loss()))
                parameter.sub_(sign * step * direction)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(key, reentrant):
    lm, given = model([spec(key), None, spec(key)]).train(), ids(11)

    def gradients():
        lm.zero_grad()
        lm(given, labels=given).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in lm.named_parameters()}

    plain = gradients()
    lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, plain[name], msg=name)


@pytest.mark.parametrize("key", KEYS)
def test_low_precision(key):
    lm, given = model(spec(key), torch.float32, initializer_range=0.1), ids()
    with torch.no_grad():
        exact = lm.double()(given).logits
        half = lm.to(torch.bfloat16)(given).logits
    assert half.dtype == torch.bfloat16
    assert float((half.double() - exact).abs().max()) < 0.05 * float(exact.abs().max())


@pytest.mark.parametrize("key", KEYS)
def test_hybrids_are_saved_and_loaded(key, tmp_path):
    lm = model([spec(key), None, spec(key)], torch.float32)
    assert lm.model.layers[1].attention.projection is not None
    lm.save_pretrained(tmp_path)
    again = FoveateForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids()).logits, lm(ids()).logits)
    assert again.config.mixer == [spec(key), None, spec(key)]


def layer_alone(key):
    """A mixer outside of a model, with a context that has what models give."""
    torch.manual_seed(3)
    layer = MixerLayer(DIM, 4, spec(key), "none").double().eval()
    x = torch.randn(2, 21, DIM, dtype=torch.float64)

    def ctx(mask):
        maps = Maps()
        if layer.mixer.reference is not None:
            layer(x[:1] * 2, ctx=Context(mask=causal(), reference=maps))
        maps.recording = False
        return Context(mask=mask, embeddings=x, input_norm=lambda e: e, reference=maps)

    return layer, x, ctx


@mixers("bidirectional")
def test_bidirectional(key):
    layer, x, ctx = layer_alone(key)
    y = layer(x, ctx=ctx(None)).y
    assert y.isfinite().all()
    other = x.clone()
    other[:, 20] += 1
    mixes = key not in ("deconstructed-mlp", "gaam")
    again = layer(other, ctx=ctx(None)).y
    assert bool((again[:, :20] != y[:, :20]).any()) is mixes


def test_what_the_layer_refuses():
    layer = MixerLayer(DIM, 4, "deconstructed-mlp")
    x = torch.zeros(2, 3, DIM)
    with pytest.raises(InputError, match=r"expected x \(B, L, 16\)"):
        layer(x[..., :4])
    with pytest.raises(InputError, match="made by new_cache"):
        layer(x, cache=[])
    with pytest.raises(InputError, match="mask= or in ctx"):
        layer(x, mask=causal(), ctx=Context(mask=causal()))
    for mask, said in ((documents([0, 2]), "there are 3 keys"), (padding([4, 3]), "only 3 keys")):
        with pytest.raises(InputError, match=said):
            layer(x, mask=mask)
    with pytest.raises(InputError, match="give it as attention="):
        MixerLayer(DIM, 4, "full")
    with pytest.raises(InputError, match="that is no mixer"):
        MixerLayer(DIM, 4, "top-k")
    with pytest.raises(InputError, match="1 texts for 3 layers"):
        model(["grassmann"])
    grown = MixerLayer(DIM, 4, "grassmann")
    cache = grown.new_cache()
    with torch.no_grad():
        grown(x, mask=causal(), cache=cache)
    with pytest.raises(InputError, match="holds 2 sequences"):
        grown(x[:1], mask=causal(), cache=cache)
    assert layer(x[:, :0]).y.shape == (2, 0, DIM)
