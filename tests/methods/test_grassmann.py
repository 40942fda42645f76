"""Causal Grassmann layers: the planes of pairs, their mean, the gate, the ring, the costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from foveate import causal, documents, padding
from foveate.methods import make
from foveate.methods.grassmann import Grassmann, mean_features, normalised, plucker
from foveate.nn import MixerLayer
from foveate.ops.errors import InputError
from foveate.parts import Context
from foveate.parts.mixer import MixerSizes

DIM = 12


def mixer(seed=0, layer=0, **options):
    torch.manual_seed(seed)
    given = {"rank": 5, "offsets": (1, 2, 5), "dropout": 0.0}
    made = Grassmann(**(given | options)).build(MixerSizes(DIM, layer=layer)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def tokens(length=23, batch=2, seed=1):
    return torch.randn(
        batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def ahead(mask=None, **more):
    return Context(mask=causal() if mask is None else mask, **more)


def by_definition(made, x, sees):
    """m of the layer, token by token and pair by pair; `sees(b, t, s)` says which pairs count."""
    z = made.reduce(x)
    out = torch.zeros_like(x)
    for b in range(len(x)):
        for t in range(x.shape[1]):
            parts = []
            for shift in (*made.offsets, *(-d for d in made.offsets)):
                s = t - shift
                if 0 <= s < x.shape[1] and sees(b, t, s):
                    p = plucker(z[b, t], z[b, s])
                    p = p / p.norm().clamp_min(made.recipe.eps)
                    parts.append(made.plucker(p))
            g = torch.stack(parts).mean(0) if parts else torch.zeros(DIM, dtype=x.dtype)
            alpha = torch.sigmoid(made.gate(torch.cat((x[b, t], g))))
            out[b, t] = alpha * x[b, t] + (1 - alpha) * g
    return functional.layer_norm(out, (DIM,), made.norm.weight, made.norm.bias)


# -- the oracles of the spec ----------------------------------------------------------------------
def test_oracle_1_lagranges_identity_and_signs():
    u, v = torch.randn(2, 7, 6, dtype=torch.float64).unbind()
    p = plucker(u, v)
    square = (u * u).sum(-1) * (v * v).sum(-1) - (u * v).sum(-1) ** 2
    torch.testing.assert_close((p * p).sum(-1), square)
    assert torch.equal(p, -plucker(v, u))
    assert not plucker(u, 4 * u).any()  # a power of two: exact
    assert plucker(u, 3 * u).abs().max() < 1e-12


def test_oracle_2_only_the_oriented_plane_counts():
    u, v = torch.randn(2, 7, 6, dtype=torch.float64).unbind()
    for a, b, c, d in torch.randn(5, 4, dtype=torch.float64).tolist():
        mixed = plucker(a * u + b * v, c * u + d * v)
        torch.testing.assert_close(mixed, (a * d - b * c) * plucker(u, v))
        sign = math.copysign(1.0, a * d - b * c)
        torch.testing.assert_close(normalised(mixed), sign * normalised(plucker(u, v)))
    torch.testing.assert_close(normalised(plucker(2 * u + 5 * v, 3 * v)), normalised(plucker(u, v)))


def test_oracle_3_pluecker_relation():
    p = plucker(*torch.randn(2, 9, 4, dtype=torch.float64).unbind())
    p12, p13, p14, p23, p24, p34 = p.unbind(-1)
    assert (p12 * p34 - p13 * p24 + p14 * p23).abs().max() < 1e-12


def test_oracle_4_in_three_dimensions_it_is_the_cross_product():
    p = plucker(torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6]))
    assert p.tolist() == [-3, -6, -3]
    assert float(p.norm()) == pytest.approx(7.348469, abs=1e-6)
    u, v = torch.randn(2, 3, dtype=torch.float64).unbind()
    x, y, z = torch.linalg.cross(u, v).tolist()
    torch.testing.assert_close(plucker(u, v), torch.tensor([z, -y, x], dtype=torch.float64))


def test_oracle_5_averaging_before_the_map_is_averaging_behind_it():
    made, x = mixer(), tokens()
    torch.testing.assert_close(
        made(x, ahead()), by_definition(made, x, lambda b, t, s: s <= t), atol=1e-6, rtol=1e-6
    )


def test_oracle_6_causal_and_reach():
    made, x = mixer(), tokens()
    before = made(x, ahead())
    other = x.clone()
    other[:, 7] += 1
    moved = (made(other, ahead()) != before).any(-1).any(0).nonzero()[:, 0].tolist()
    assert moved == [7, 8, 9, 12]
    second = mixer(seed=3)
    deep = (second(made(other, ahead()), ahead()) != second(before, ahead())).any(-1).any(0)
    assert deep.nonzero()[:, 0].tolist() == [7, 8, 9, 10, 11, 12, 13, 14, 17]
    assert max(deep.nonzero()) <= 7 + 2 * made.reach


@pytest.mark.parametrize("prompt", [1, 3, 11])
def test_oracle_7_stream_from_the_ring_equals_the_full_pass(prompt):
    layer = MixerLayer(DIM, 1, mixer())
    x = tokens()
    cache = layer.new_cache()
    with torch.no_grad():
        parts = [
            layer(p, mask=causal(), cache=cache).y
            for p in x.split([prompt, *[1] * (23 - prompt)], 1)
        ]
        torch.testing.assert_close(
            torch.cat(parts, 1), layer(x, mask=causal()).y, atol=1e-6, rtol=1e-6
        )
    assert cache.bytes() == 2 * 5 * 5 * 8  # max(W) * r numbers, whatever the length


def test_oracle_8_limits_of_the_gate():
    made, x = mixer(), tokens()
    z = made.reduce(x)
    g = made.geometry(x, z, ahead())
    with torch.no_grad():
        made.gate.bias.fill_(1e3)
    torch.testing.assert_close(made(x, ahead()), made.norm(x))
    with torch.no_grad():
        made.gate.bias.fill_(-1e3)
    torch.testing.assert_close(made(x, ahead()), made.norm(g))
    with torch.no_grad():
        made.gate.bias.zero_()
    assert not g[:, 0].any()
    alpha = torch.sigmoid(made.gate.weight[:, :DIM] @ x[0, 0])
    torch.testing.assert_close(made(x, ahead())[0, 0], made.norm(alpha * x[0, 0]))


@pytest.mark.parametrize(("dim", "rank"), [(256, 32), (64, 16)])
def test_oracle_9_parameters(dim, rank):
    made = Grassmann(rank=rank).build(MixerSizes(dim))
    c = rank * (rank - 1) // 2
    expected = (dim * rank + rank) + (c * dim + dim) + (2 * dim * dim + dim) + 2 * dim
    assert sum(p.numel() for p in made.parameters()) == expected


# -- gradients, forms, masks -----------------------------------------------------------------------
@pytest.mark.parametrize("smooth", [False, True])
def test_gradients(smooth):
    z = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    shifts = (1, 3, -2)
    valid = torch.stack([torch.arange(2, 9) - d for d in shifts])
    weight = ((valid >= 0) & (valid < 9)).double()[:, None] * torch.rand(3, 2, 7).double()
    assert torch.autograd.gradcheck(
        lambda z: mean_features(z, 2, shifts, weight, 0.3 if smooth else 1e-8, smooth), z
    )


def test_gradients_are_those_of_the_definition_over_many_chunks(monkeypatch):
    monkeypatch.setattr("foveate.methods.grassmann.planes._NUMBERS", 1)
    made, x = mixer(), tokens(67).requires_grad_()
    weight = torch.randn_like(x)
    wanted = (x, *made.parameters())
    ours = torch.autograd.grad((made(x, ahead()) * weight).sum(), wanted)
    theirs = torch.autograd.grad(
        (by_definition(made, x, lambda b, t, s: s <= t) * weight).sum(), wanted
    )
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


def test_parallel_vectors_have_no_plane_and_finite_gradients():
    z = torch.ones(1, 6, 4, requires_grad=True)
    for smooth in (False, True):
        out = mean_features(z, 0, (1,), torch.ones(1, 1, 6), 1e-8, smooth)
        assert not out.any()
        (grad,) = torch.autograd.grad(out.sum(), z)
        assert grad.isfinite().all()


def test_rounding_of_parallel_vectors_is_no_plane():
    """In fp32 p of u and c u isn't 0, but what it is depends on the order of the sums."""
    torch.manual_seed(4)
    z = 3 * torch.rand(1, 40, 1).add(0.3) * torch.randn(16)
    z.requires_grad_()
    assert plucker(z[:, 1:], z[:, :-1]).norm(dim=-1).max() > 1e-8  # more than eps
    out = mean_features(z, 0, (1, 2), torch.full((2, 1, 40), 0.5), 1e-8, False)
    assert not out.any()
    (grad,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), z)
    assert not grad.any()
    # Vectors that differ by more than rounding, however little, have one.
    turned = (z + 1e-4 * torch.randn(40, 16)).detach()
    out = mean_features(turned, 1, (1,), torch.ones(1, 1, 39), 1e-8, False)
    torch.testing.assert_close(out, normalised(plucker(turned[:, 1:], turned[:, :-1])))


def test_a_run_of_one_token_decodes_as_it_reads_and_trains_as_in_float64():
    torch.manual_seed(2)
    layer = MixerLayer(64, 1, "grassmann(rank=16, dropout=0.0)")
    torch.nn.init.normal_(layer.mixer.reduce.weight, std=0.3)
    ids = torch.randint(0, 9, (2, 40))
    ids[:, 5:30] = 3  # such as spaces
    table = torch.randn(9, 64, requires_grad=True)

    def full():
        return layer(layer(table[ids], mask=causal()).y, mask=causal()).y

    cache, deeper = layer.new_cache(), layer.new_cache()
    with torch.no_grad():
        parts = [
            layer(layer(x, mask=causal(), cache=cache).y, mask=causal(), cache=deeper).y
            for x in table[ids].split([11, *[1] * 29], 1)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), full(), atol=2e-5, rtol=2e-5)
    weight = torch.randn(2, 40, 64)
    (ours,) = torch.autograd.grad((full() * weight).sum(), table)
    layer, table = layer.double(), table.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad((full() * weight).sum(), table)
    torch.testing.assert_close(ours.double(), exact, atol=1e-3, rtol=1e-3)


def test_bidirectional_pairs_count_on_both_sides():
    made, x = mixer(), tokens()
    expected = by_definition(made, x, lambda b, t, s: True)
    torch.testing.assert_close(made(x, Context()), expected)


@pytest.mark.parametrize(("window", "stride"), [(4, None), (6, 3)])
def test_pairs_inside_windows(window, stride):
    made, x = mixer(window=window, stride=stride, offsets=tuple(range(1, window))), tokens()
    step = stride or window

    def together(b, t, s):
        return any(k <= min(s, t) and max(s, t) < k + window for k in range(0, 23, step))

    torch.testing.assert_close(made(x, Context()), by_definition(made, x, together))
    torch.testing.assert_close(
        made(x, ahead()), by_definition(made, x, lambda b, t, s: s < t and together(b, t, s))
    )


def test_documents_and_padding_cut_pairs():
    made, x = mixer(), tokens(batch=1)
    packed = made(x, ahead(causal() & documents([0, 9, 23])))
    torch.testing.assert_close(packed[:, :9], made(x[:, :9], ahead()))
    torch.testing.assert_close(packed[:, 9:], made(x[:, 9:], ahead()))
    x = tokens()
    real = made(x, Context(mask=padding([23, 14])))
    torch.testing.assert_close(real[1:, :14], made(x[1:, :14], Context()))


def test_heads_have_maps_of_their_own():
    made, x = mixer(rank=4, heads=3), tokens()
    mean = torch.randn(2, 23, 6, dtype=torch.float64)
    rows = made.plucker.weight
    parts = [mean[..., 2 * h : 2 * h + 2] @ rows[4 * h : 4 * h + 4].T for h in range(3)]
    torch.testing.assert_close(made._planes(mean), torch.cat(parts, -1) + made.plucker.bias)
    assert made(x, ahead()).shape == x.shape


def test_offsets_for_each_layer():
    recipe = Grassmann(rank=4, offsets=((1,), (2, 4)))
    assert recipe.build(MixerSizes(8, layer=1)).offsets == (2, 4)
    with pytest.raises(InputError, match="none for layer 2"):
        recipe.build(MixerSizes(8, layer=2))


def test_low_precision_is_formed_in_fp32():
    made, x = mixer(), tokens()
    exact = made(x, ahead())
    half = made.to(torch.bfloat16)(x.bfloat16(), ahead())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, atol=6e-2, rtol=6e-2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 1}, "rank"),
        ({"offsets": (1, 1)}, "different distances"),
        ({"offsets": ()}, "different distances"),
        ({"offsets": (0,)}, "offset"),
        ({"wiring": "C"}, "'A' or 'B'"),
        ({"dropout": 1.0}, "dropout"),
        ({"stride": 9, "window": 8}, "windows of 8"),
        ({"stride": 2}, "windows of None"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_what_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        Grassmann(**options)


def test_heads_that_divide_nothing_are_refused():
    with pytest.raises(InputError, match="divide"):
        Grassmann(rank=4, heads=4).build(MixerSizes(8))


def test_the_ring_forgets_only_what_it_has():
    layer = MixerLayer(DIM, 1, mixer())
    x, cache = tokens(), layer.new_cache()
    with torch.no_grad():
        layer(x[:, :4], mask=causal(), cache=cache)
        cache.truncate(2)
        again = layer(x[:, 2:], mask=causal(), cache=cache).y
        torch.testing.assert_close(again, layer(x, mask=causal()).y[:, 2:])
    with pytest.raises(InputError, match="ring keeps the last 5 of 23"):
        cache.truncate(20)
    cache.truncate(0)
    assert len(cache) == cache.bytes() == 0


# -- costs -----------------------------------------------------------------------------------------
def flops_of(length, dim=32, rank=8):
    from torch.utils.flop_counter import FlopCounterMode

    made = make(f"grassmann(rank={rank}, dropout=0.0)").build(MixerSizes(dim))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(torch.randn(1, length, dim), ahead())
    return counter.get_total_flops()


def test_products_grow_with_the_length_and_not_with_the_offsets():
    c = 8 * 7 // 2
    assert flops_of(64) == 64 * (2 * 32 * 8 + 2 * c * 32 + 4 * 32 * 32)
    assert flops_of(4096) == 64 * flops_of(64)
