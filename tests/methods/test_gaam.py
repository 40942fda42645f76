"""The Gaussian gate against its definition, written out, and the spec's examples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate import Context, causal, documents, padding, window
from foveate.methods.gaam import GaussianGate, Importance, importance_factor
from foveate.nn import MixerLayer
from foveate.ops.errors import InputError


def gate(*args, **options) -> GaussianGate:
    """One whose parameters are no longer those it began with."""
    made = GaussianGate(*args, **options).double()
    with torch.no_grad():
        made.delta.normal_(std=0.3)
    return made


def package(x: Tensor, made: GaussianGate, padding_value=None) -> Tensor:
    """The published package's arithmetic (0.1.5), from its description: one head after another."""
    outs = []
    size = x.shape[made.axis] // made.heads
    for head in range(made.heads):
        start = head * size
        length = size if head < made.heads - 1 else x.shape[made.axis] - start
        part = x.narrow(made.axis, start, length)
        kept = torch.ones_like(part, dtype=torch.bool)
        if padding_value is not None:
            kept = part != padding_value
        filled = torch.where(kept, part, torch.zeros_like(part))
        mean = filled.mean(made.axis, keepdim=True)
        var = filled.var(made.axis, keepdim=True) + 1e-8
        product = torch.ones_like(part)
        for delta, c in zip(made.delta[head], made.c[head]):
            y = (part - (mean + delta)) / var.sqrt()
            product = product * torch.exp(-(y**2) / (2 * c**2)) / torch.sqrt(2 * torch.pi * c**2)
        product = product / product.sum(made.axis, keepdim=True).clamp(min=1e-8)
        outs.append(torch.where(kept, part * product, part))
    return torch.cat(outs, made.axis)


# -- the spec's oracles ---------------------------------------------------------------------------
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("gaussians", [1, 3])
@pytest.mark.parametrize("heads", [1, 4])
def test_oracle_1_equals_the_package(axis, gaussians, heads):
    x = torch.randn(25, 21, 23).double()
    exactly = gate(heads, gaussians, axis=axis, compat=True)  # with widths as they are drawn
    torch.testing.assert_close(exactly(x), package(x, exactly), atol=1e-12, rtol=1e-10)
    made = gate(heads, gaussians, axis=axis)
    with torch.no_grad():
        made.c.uniform_(0.9, 3)  # no sum below eps, which only the package raises to it
    torch.testing.assert_close(made(x), package(x, made), atol=1e-6, rtol=0)


def test_oracle_1_equals_the_package_with_padding():
    x = torch.randn(3, 12, 5).double()
    x[1, 7:], x[2, 2, 1] = 0.0, 0.0
    made = gate(2, 2, compat=True)
    ours = made(x, real=x != 0)
    torch.testing.assert_close(ours, package(x, made, padding_value=0.0), atol=1e-12, rtol=1e-10)
    made = gate(1, 1, compat=True)
    with torch.no_grad():
        made.c.fill_(1e-2)  # every weight vanishes, and so their sum is raised
    far = torch.tensor([[0.0, 1.0, 10.0, 11.0]], dtype=torch.float64)
    torch.testing.assert_close(made(far), package(far, made), atol=1e-12, rtol=1e-10)
    assert made(far).abs().max() < 1e-12


def test_oracle_2_weights_sum_to_one_and_wide_gaussians_weigh_alike():
    x = torch.randn(3, 12, 5).double()
    made = gate(4, 3)
    sums = made.weights(x).unflatten(1, (4, 3)).sum(2)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-12, rtol=0)
    with torch.no_grad():
        made.c.fill_(1e9)
    torch.testing.assert_close(made(x), x / 3, atol=1e-9, rtol=0)
    flat = gate(3, form="density", features=5)
    with torch.no_grad():
        flat.c.fill_(1e18)
    torch.testing.assert_close(flat.weights(x), torch.ones_like(x), atol=1e-9, rtol=0)
    torch.testing.assert_close(flat(x), x, atol=1e-9, rtol=0)


def test_oracle_3_a_product_of_gaussians_is_one_gaussian():
    x = torch.randn(2, 40).double()
    made = gate(1, 3)
    s = (x.var(1, keepdim=True) + 1e-8).sqrt()
    y = (x - x.mean(1, keepdim=True)) / s
    c, delta = made.c[0], made.delta[0]
    cbar = (1 / c.square()).sum().rsqrt()
    centre = cbar.square() * (delta / s / c.square()).sum(1, keepdim=True)
    one = (-((y - centre) ** 2) / (2 * cbar**2)).softmax(1)
    torch.testing.assert_close(made.weights(x), one, atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", ["mixture", "density"])
def test_oracle_4_no_offset_is_affine_invariant(form):
    x = torch.randn(3, 12, 5).double() * 50  # so that eps is nothing beside the variance
    made = gate(2, form=form, features=5)
    with torch.no_grad():
        made.delta.zero_()
    for a, b in ((7.0, -30.0), (-2.0, 5.0)):
        torch.testing.assert_close(made.weights(a * x + b), made.weights(x), atol=1e-6, rtol=0)
    with torch.no_grad():
        made.delta.fill_(20.0)
    assert not torch.allclose(made.weights(-2.0 * x), made.weights(x), atol=1e-2)


def test_oracle_5_worked_example():
    made = GaussianGate().double()
    with torch.no_grad():
        made.c.fill_(1.0)
    x = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64)

    def close(found, expected):
        torch.testing.assert_close(found[0], torch.tensor(expected).double(), atol=5e-5, rtol=0)

    close(made.weights(x), [0.1772, 0.3228, 0.3228, 0.1772])
    close(made(x), [0.1772, 0.6457, 0.9685, 0.7087])


@pytest.mark.parametrize("form", ["mixture", "density"])
def test_oracle_6_permutations_and_gradients(form):
    x = torch.randn(3, 12, 5).double()
    made = gate(2, form=form, features=5)
    order = torch.cat((torch.randperm(6), 6 + torch.randperm(6)))
    torch.testing.assert_close(made(x[:, order]), made(x)[:, order], atol=1e-13, rtol=0)

    def call(x, delta, c):
        return torch.func.functional_call(made, {"delta": delta, "c": c}, (x,))

    given = (x.requires_grad_(), made.delta.detach().requires_grad_(), made.c.detach())
    assert torch.autograd.gradcheck(call, (*given[:2], given[2].requires_grad_()))


def test_oracle_6_importance_factor():
    made, seen = gate(4, form="density", features=5), Importance()
    batches = torch.randn(6, 7, 12, 5).double().unbind(0)
    for x in batches:
        seen.add(made.weights(x))
    mean = made.weights(torch.cat(batches)).mean(0)
    torch.testing.assert_close(seen.mean, mean)
    assert seen.count == 42
    factor = seen.factor
    assert factor.shape == (12, 5)
    assert (float(factor.amin()), float(factor.amax())) == (0, 1)
    torch.testing.assert_close(importance_factor(3.5 * mean + 2), factor)
    assert importance_factor(torch.ones(3, 2)).eq(0).all()
    with pytest.raises(InputError, match=r"expected weights \(B, 12, 5\)"):
        seen.add(torch.ones(2, 5, 12))
    with pytest.raises(InputError, match="first"):
        _ = Importance().factor


# -- the density form, padding, precision ----------------------------------------------------------
@pytest.mark.parametrize("time", [False, True])
def test_density_by_hand(time):
    """Heads partition the layers; statistics over a head's layers, of the mean over time."""
    x = torch.randn(3, 7, 4, 5).double() if time else torch.randn(3, 7, 5).double()
    made = gate(2, form="density", features=5)
    with torch.no_grad():
        made.c.uniform_(0.5, 3)
    for b in range(3):
        for head, layers in ((0, range(0, 3)), (1, range(3, 7))):
            for d in range(5):
                group = [x[b, n, ..., d].mean().item() for n in layers]
                mu = sum(group) / len(group)
                s2 = abs(sum(g * g for g in group) / len(group) - mu * mu) + 1e-8
                for n in layers:
                    off = x[b, n, ..., d] - (mu + made.delta[head, d])
                    expected = torch.exp(-(off**2) / (s2 + 1e-5) / (2 * made.c[head, d]))
                    torch.testing.assert_close(made.weights(x)[b, n, ..., d], expected)


def test_density_along_features():
    x = torch.randn(3, 4, 7).double()
    made = gate(2, form="density", axis=-1, features=7)
    assert made.delta.shape == (1, 7)
    first = x[..., :3]
    mu, s2 = first.mean(-1, keepdim=True), first.var(-1, correction=0, keepdim=True) + 1e-8
    expected = torch.exp(-((first - mu - made.delta[0, :3]) ** 2) / (s2 + 1e-5) / 4)
    torch.testing.assert_close(made.weights(x)[..., :3], expected)


def test_density_along_an_axis_that_happens_to_be_the_last():
    """Counted from the front it may be another one of another x, so each head has its own row."""
    x = torch.randn(3, 4, 7).double()
    made, same = (gate(2, form="density", axis=axis, features=7) for axis in (2, -1))
    assert made.delta.shape == (2, 7)
    with torch.no_grad():
        same.delta.copy_(torch.cat((made.delta[:1, :3], made.delta[1:, 3:]), 1))
    torch.testing.assert_close(made(x), same(x), atol=1e-14, rtol=0)


@pytest.mark.parametrize("form", ["mixture", "density"])
def test_a_padded_sequence_is_the_sequence_alone(form):
    x, made = torch.randn(3, 12, 5).double(), gate(3, form=form, features=5)
    real = torch.ones(3, 12, dtype=torch.bool)
    real[0, 7:], real[1, :5] = False, False
    x[~real] = torch.nan
    x.requires_grad_()
    out = made(x, real)
    for b in range(3):
        alone = made(x[b : b + 1, real[b]])
        torch.testing.assert_close(out[b, real[b]], alone[0], atol=1e-14, rtol=0)
    assert out[~real].eq(0).all()
    grad = torch.autograd.grad(out.sum(), made.delta)[0]
    assert grad.isfinite().all()


@pytest.mark.parametrize("form", ["mixture", "density"])
@pytest.mark.parametrize(("dtype", "band"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision(form, dtype, band):
    x = torch.randn(3, 16, 8).to(dtype)
    made = gate(4, form=form, features=8).to(dtype)
    out = made(x)
    assert out.dtype == dtype
    assert made.weights(x).dtype == torch.float32
    expected = gate(4, form=form, features=8)
    expected.load_state_dict(made.state_dict())
    torch.testing.assert_close(out.double(), expected(x.double()), atol=band, rtol=band)


def test_tiny_widths_do_not_divide_by_zero():
    x = torch.randn(2, 6, 3)
    for form in ("mixture", "density"):
        made = GaussianGate(1, form=form, features=3)
        with torch.no_grad():
            made.c.zero_()
        assert made(x).isfinite().all()


def test_what_a_gate_begins_with():
    made = GaussianGate(100, 100)
    assert made.delta.eq(0).all()
    logs = made.c.log()
    assert logs.mean().abs() < 0.05
    assert math.isclose(logs.std().item(), 1, abs_tol=0.05)
    assert GaussianGate(8, form="density", features=4).c.eq(2).all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: GaussianGate(form="mix")(x), "is unknown"),
        (lambda x: GaussianGate(form="density")(x), "give features"),
        (lambda x: GaussianGate(2, 3, form="density", features=5)(x), "gaussians=1"),
        (lambda x: GaussianGate(form="density", features=4)(x), "has 5 features"),
        (lambda x: GaussianGate(axis=3)(x), "no axis 3"),
        (lambda x: GaussianGate(13)(x), "can't be split into 13 heads"),
        (lambda x: GaussianGate(0)(x), "heads"),
        (lambda x: GaussianGate(3)(x, torch.arange(12).lt(2).expand(3, -1)), "2 real entries"),
        (lambda x: GaussianGate()(x, torch.ones(3, 5, dtype=torch.bool)), "along axis 1"),
        (lambda x: GaussianGate(axis=-1)(x, torch.ones(3, 12).bool()), "axis -1"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call(torch.randn(3, 12, 5))


# -- as a mixer ------------------------------------------------------------------------------------
CAUSAL = "gaam(axis='tokens', form='density', heads=1)"


def mixer(spec, dim=6):
    layer = MixerLayer(dim, 1, spec).double().eval()
    with torch.no_grad():
        layer.mixer.gate.delta.normal_(std=0.3)
        layer.mixer.gate.c.uniform_(0.5, 3)
    return layer


def test_running_statistics_by_hand():
    layer, x = mixer(CAUSAL), torch.randn(2, 9, 6).double() + 50
    y, gate = layer(x, mask=causal()).y, layer.mixer.gate
    for t in range(9):
        past = x[:, : t + 1]
        mean, var = past.mean(1), past.var(1, correction=0)
        off = (x[:, t] - mean - gate.delta[0]) / (var + 1e-8 + 1e-5).sqrt()
        expected = x[:, t] * torch.exp(-(off**2) / (2 * gate.c[0]))
        torch.testing.assert_close(y[:, t], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("side", ["left", "none"])
@pytest.mark.parametrize("cuts", [(0, 9), (0, 1, 2, 3, 9), (0, 5, 6, 9)])
@pytest.mark.parametrize("spec", [CAUSAL, "gaam", "gaam(form='density', heads=2)"])
def test_steps_equal_the_full_forward(spec, cuts, side):
    """Also where a sequence's first steps hold padding only."""
    layer, x = mixer(spec), torch.randn(2, 9, 6).double()
    pads = torch.tensor([0, 3 if side == "left" else 0])

    def call(low, high, cache):
        at = torch.arange(high) - pads[:, None]
        mask = causal() & padding((high - pads).clamp(min=0))
        ctx = Context(mask=mask, q_positions=at[:, low:], kv_positions=at, real=at[:, low:] >= 0)
        return layer(x[:, low:high], ctx=ctx, cache=cache).y

    with torch.no_grad():
        whole, cache = call(0, 9, None), layer.new_cache()
        steps = torch.cat([call(a, b, cache) for a, b in zip(cuts, cuts[1:])], 1)
    real = torch.arange(9) >= pads[:, None]
    torch.testing.assert_close(steps[real], whole[real], atol=1e-12, rtol=1e-12)
    alone = layer(x[1:, pads[1] :], mask=causal()).y
    torch.testing.assert_close(whole[1:, pads[1] :], alone, atol=1e-12, rtol=1e-12)
    held = sum(math.prod(f.shape) for f in cache.fields) * 8 * 2
    assert cache.bytes() == held


def test_both_ways_a_padded_sequence_is_the_sequence_alone():
    layer, x = mixer("gaam(axis='tokens', heads=2, gaussians=2)"), torch.randn(2, 9, 6).double()
    y = layer(x, mask=padding([9, 5])).y
    torch.testing.assert_close(y[1:, :5], layer(x[1:, :5]).y, atol=1e-13, rtol=0)
    assert not torch.allclose(y[0, :5], layer(x[:1, :5]).y[0], atol=1e-3)


def test_what_the_mixer_refuses():
    x = torch.randn(2, 9, 6).double()
    for spec in ("gaam(axis='tokens')", "gaam(axis='tokens', form='density', heads=2)"):
        with pytest.raises(InputError, match="only known at its end"):
            mixer(spec)(x, mask=causal())
        with pytest.raises(InputError, match="only known at its end"):
            mixer(spec).new_cache()
    with pytest.raises(InputError, match="the mask is neither"):
        mixer(CAUSAL)(x, mask=window(3, 3))
    for mask in (None, window(3, 0), causal() & documents([0, 4, 9])):
        layer = mixer(CAUSAL)
        with pytest.raises(InputError, match="gaam decodes under a causal mask"):
            layer(x, mask=mask, cache=layer.new_cache())
    for spec, said in (
        ("gaam(axis='feature')", "did you mean 'features'"),
        ("gaam(form='density', gaussians=2)", "one for each feature"),
        ("gaam(heads=7)", "the layer has 6 features"),
    ):
        with pytest.raises(InputError, match=said):
            mixer(spec)
