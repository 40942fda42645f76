"""Tensor attention in a layer and in models: its own maps, its states."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate import Context, causal, documents, padding
from foveate.methods.tensor_attention import TensorAttention, tensor_attention
from foveate.methods.tensor_attention.layer import SumState, TupleState
from foveate.ops.errors import InputError
from foveate.parts import Heads, StateCache

TIGHT = {"atol": 1e-12, "rtol": 1e-12}
SUMS = "tensor-attention(form='features', radius=2.0)"
GIVEN = [
    "tensor-attention",
    "tensor-attention(tied=True)",
    "tensor-attention(scale='1/sqrt(d)', rotary=True)",
    "tensor-attention(order=4)",
    "tensor-attention(order=2)",
    SUMS,
    SUMS.replace(")", ", order=4, degree=6, polynomial='chebyshev', tolerance=0.1)"),
]


def layer(attention: str = "tensor-attention", **more):
    torch.manual_seed(3)
    made = foveate.Attention(24, 6, "gqa(kv_heads=3)", attention, **more).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(0.7)
    return made


def x_of(batch=2, length=15):
    return torch.randn(batch, length, 24, dtype=torch.float64)


def test_a_layer_is_the_formula():
    made, x = layer(position="rope"), x_of()
    p, own = made.projection, made.attention
    entries = p.entries(x)
    k1, v1 = p.expand(entries)
    k2, v2 = (m[0](x).unflatten(-1, (3, 4)).transpose(1, 2) for m in (own.k_proj, own.v_proj))
    out = tensor_attention(p.query(x), (k1, k2), (v1, v2), causal(), scale=1 / 4).out
    torch.testing.assert_close(made(x, mask=causal()).y, p.output(out, x), **TIGHT)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("cuts", [[1] * 15, [6, 1, 1, 7]])
def test_decoding_equals_the_full_forward(given, cuts):
    made, x = layer(given), x_of()
    want = made(x, mask=causal()).y
    cache = made.new_cache()
    with torch.no_grad():
        found = [made(part, mask=causal(), cache=cache).y for part in x.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(found, 1), want, **TIGHT)
    assert len(cache) == 15


@pytest.mark.parametrize("given", GIVEN)
def test_decoding_behind_left_padding(given):
    made, x = layer(given), x_of()
    at = torch.arange(15) - torch.tensor([[0], [4]])

    def ctx(first, stop):
        mask = causal() & padding([stop, max(stop - 4, 0)])
        return Context(mask=mask, q_positions=at[:, first:stop], kv_positions=at[:, :stop])

    want = made(x, ctx=ctx(0, 15)).y
    alone = made(x[1:, 4:], mask=causal()).y
    torch.testing.assert_close(want[1:, 4:], alone, **TIGHT)
    cache = made.new_cache()
    with torch.no_grad():
        found = [
            made(x[:, first:stop], ctx=ctx(first, stop), cache=cache).y
            for first, stop in ((0, 6), (6, 7), (7, 15))
        ]
    torch.testing.assert_close(torch.cat(found, 1)[1:, 4:], alone, **TIGHT)
    torch.testing.assert_close(torch.cat(found, 1)[:1], want[:1], **TIGHT)


def test_all_of_a_layers_maps_learn():
    made = layer("tensor-attention(order=4)").train()
    made(x_of(), mask=causal()).y.square().sum().backward()
    for name, p in made.named_parameters():
        assert p.grad.abs().max() > 0, name
    assert len(made.attention.k_proj) == len(made.attention.v_proj) == 2


def test_a_state_keeps_all_keys_and_values_or_sums_alone():
    tuples = layer().new_cache()
    assert isinstance(tuples.state, TupleState)
    assert tuples.elements_per_token == 4 * 3 * 4  # two keys and two values of 3 heads of 4
    assert layer("tensor-attention(tied=True)").new_cache().elements_per_token == 2 * 3 * 4
    made = layer(SUMS)
    cache = made.new_cache()
    assert isinstance(cache.state, SumState)
    assert cache.elements_per_token == 0
    sizes = []
    with torch.no_grad():
        for _ in range(2):
            made(x_of(length=9), mask=causal(), cache=cache)
            sizes.append(cache.bytes())
    (_, unit, shape, limit), _ = cache.fields
    assert (unit, limit, shape[0], shape[2]) == ("sequence", 1, 3, 5)
    assert sizes == [2 * 2 * shape[0] * shape[1] * shape[2] * 8] * 2


@pytest.mark.parametrize("given", GIVEN)
def test_states_follow_beams_and_are_cut_where_they_can(given):
    made, x = layer(given), x_of()
    want = made(x, mask=causal()).y
    rows = torch.tensor([1, 0, 1])
    cache = made.new_cache()
    with torch.no_grad():
        made(x[:, :9], mask=causal(), cache=cache)
        cache.reorder(rows)
        found = made(x[rows, 9:], mask=causal(), cache=cache).y
    torch.testing.assert_close(found, want[rows, 9:], **TIGHT)
    if isinstance(cache.state, SumState):
        with pytest.raises(InputError, match="none can be taken back"):
            cache.truncate(9)
        return
    cache.truncate(11)
    with torch.no_grad():
        found = made(x[rows, 11:], mask=causal(), cache=cache).y
    torch.testing.assert_close(found, want[rows, 11:], **TIGHT)


def test_sums_are_wide_where_the_radius_asks_for_it():
    torch.manual_seed(3)
    for radius, dtype in ((2.0, torch.float32), (6.0, torch.float64)):
        made = foveate.Attention(
            8, 4, "mha", f"tensor-attention(form='features', radius={radius})"
        ).eval()
        cache, x = made.new_cache(), 0.3 * torch.randn(2, 15, 8)
        with torch.no_grad():
            found = [made(part, mask=causal(), cache=cache).y for part in x.split([6, 1, 8], 1)]
            torch.testing.assert_close(torch.cat(found, 1), made(x, mask=causal()).y)
        assert {held.dtype for held in cache.state.sums} == {dtype}


def test_a_step_beyond_the_radius_is_refused_and_leaves_the_state():
    made = layer(SUMS)
    cache = made.new_cache()
    with torch.no_grad():
        made(x_of(), mask=causal(), cache=cache)
        before = cache.state.sums
        with pytest.raises(InputError, match="made for 2;"):
            made(x_of(length=1) * 30, mask=causal(), cache=cache)
    assert len(cache) == 15
    assert cache.state.sums is not None
    assert all(one is two for one, two in zip(before, cache.state.sums))


def test_the_bound_is_told():
    aux = layer("tensor-attention(form='features')")(x_of(), mask=causal()).aux
    assert set(aux) == {"logit_bound"}
    assert 0 < aux["logit_bound"] < 2


@pytest.mark.parametrize("given", ["tensor-attention(form='features')", SUMS])
@pytest.mark.parametrize("side", ["left", "right", "both ways"])
def test_what_stands_on_padding_is_not_in_the_bound(given, side):
    """Neither the degree, and so the numbers, nor a refusal comes of it."""
    made, x = layer(given), x_of()
    at = torch.arange(15) - torch.tensor([[0], [4]])
    mask = padding([15, 11]) if side == "both ways" else causal() & padding([15, 11])
    real = torch.arange(15).expand(2, -1) < torch.tensor([[15], [11]])
    if side == "left":
        ctx, real = Context(mask=mask, q_positions=at, kv_positions=at), at >= 0
    else:
        ctx = Context(mask=mask)
    want = made(x, ctx=ctx)
    x[~real] *= 50
    got = made(x, ctx=ctx)
    assert torch.equal(got.y[real], want.y[real])
    assert torch.equal(got.aux["logit_bound"], want.aux["logit_bound"])
    cache = made.new_cache()
    with torch.no_grad():
        kept = made(x, ctx=ctx, cache=cache).y if side != "both ways" else want.y
    torch.testing.assert_close(kept[real], want.y[real], **TIGHT)


def test_packed_documents_stay_apart_when_exact():
    made, x = layer(), x_of(1)
    y = made(x, mask=causal() & documents([0, 6, 15])).y
    parts = [made(part, mask=causal()).y for part in x.split([6, 9], 1)]
    torch.testing.assert_close(y, torch.cat(parts, 1), **TIGHT)


def test_bidirectional_layers():
    for given in ("tensor-attention", SUMS):
        made, x = layer(given), x_of()
        y = made(x).y
        flipped = made(x.flip(1)).y
        torch.testing.assert_close(flipped.flip(1), y, **TIGHT)  # no positions: order is nothing


def test_cross_attention_needs_tied_factors():
    x, other = x_of(), x_of(length=15)
    with pytest.raises(InputError, match="self-attention"):
        layer()(x, other)
    assert layer("tensor-attention(tied=True)")(x, other).y.shape == x.shape


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"order": 1}, "at least 2"),
        ({"scale": "1/n"}, "1/sqrt"),
        ({"form": "fast"}, "auto, exact, features"),
        ({"polynomial": "pade"}, "taylor or chebyshev"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"radius": -1.0}, "radius"),
    ],
)
def test_fields_that_do_not_fit_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        TensorAttention(**given)


def test_too_many_features_are_refused_when_the_layer_is_built():
    with pytest.raises(InputError, match="max_rank"):
        TensorAttention(form="features", radius=4.0).build(Heads(24, 6, 3, 16, 16))


def test_sums_decode_with_a_causal_mask_only():
    made = layer(SUMS)
    cache = StateCache(made.attention.new_state())
    with torch.no_grad(), pytest.raises(InputError, match="causal"):
        made(x_of(), cache=cache)


def test_a_model_generates_from_both_states():
    pytest.importorskip("transformers")
    from foveate.models import FoveateConfig, FoveateForCausalLM

    torch.manual_seed(0)
    config = FoveateConfig(
        vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=8,
        attention=["tensor-attention", SUMS],
    )  # fmt: skip
    model = FoveateForCausalLM(config).eval()
    ids = torch.randint(1, 67, (2, 9))
    found = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for _ in range(6):
        logits = model(ids, use_cache=False).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, ids)
