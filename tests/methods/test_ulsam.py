"""ULSAM: the spec's oracles, against the formula group by group, and counts against tables."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from foveate.methods import make
from foveate.methods.naming import make_attention
from foveate.methods.ulsam import ULSAM, SubspaceAttention
from foveate.models import MobileNetV1, MobileNetV2
from foveate.models.macs import macs, parameters
from foveate.ops.errors import InputError


def module(channels: int = 12, train: bool = False, **hyper) -> SubspaceAttention:
    """In float64, with norms that do something."""
    made = ULSAM(**({"groups": 3} | hyper)).build(channels).double().train(train)
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, 0.2)
            nn.init.normal_(part.bias, 0.5, 0.2)
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 2)
    return made


def by_group(m: SubspaceAttention, x: Tensor) -> Tensor:
    """The formula, one group after the other, max-pool over neighbours that exist."""
    g, size = m.hyper.groups, m.channels // m.hyper.groups
    out = []
    for n in range(g):
        at = slice(n * size, (n + 1) * size)
        part = x[:, at]
        t = part * m.depthwise.weight[at].view(-1, 1, 1) + m.depthwise.bias[at].view(-1, 1, 1)
        if m.hyper.norm_act:
            t = _norm(m, m.depthwise_norm, t, at).clamp_min(0)
        h, w = t.shape[2:]
        t = torch.stack(
            [
                torch.stack(
                    [
                        t[:, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].amax((2, 3))
                        for j in range(w)
                    ],
                    -1,
                )
                for i in range(h)
            ],
            -2,
        )
        z = (t * m.pointwise.weight[n].view(-1, 1, 1)).sum(1) + m.pointwise.bias[n]
        if m.hyper.norm_act:
            z = _norm(m, m.pointwise_norm, z[:, None], slice(n, n + 1))[:, 0].clamp_min(0)
        a = z.flatten(1).softmax(1).view_as(z)[:, None]
        out.append(a * part + part)
    return torch.cat(out, 1)


def _norm(m: nn.Module, norm: nn.BatchNorm2d, x: Tensor, at: slice) -> Tensor:
    mean, var = norm.running_mean[at], norm.running_var[at]
    if m.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    mean, var, weight, bias = (
        v.view(-1, 1, 1) for v in (mean, var, norm.weight[at], norm.bias[at])
    )
    return (x - mean) / (var + norm.eps).sqrt() * weight + bias


@pytest.mark.parametrize("norm_act", [True, False])
def test_oracle_1_a_constant_score_is_a_constant_gain(norm_act):
    m = ULSAM(groups=4, norm_act=norm_act).build(16).eval()
    nn.init.zeros_(m.pointwise.weight)
    x = torch.randn(2, 16, 5, 7)
    torch.testing.assert_close(m(x), (1 + 1 / 35) * x, atol=1e-6, rtol=0)
    torch.testing.assert_close(m.maps(x), torch.full((2, 4, 5, 7), 1 / 35), atol=1e-6, rtol=0)
    m.hyper = ULSAM(groups=4, norm_act=norm_act, gain="positions")
    torch.testing.assert_close(m(x), 2 * x, atol=1e-5, rtol=0)


def test_oracle_2_maps_sum_to_one():
    m = module(train=True)
    x = torch.rand(3, 12, 6, 5, dtype=torch.float64)
    maps, y = m.maps(x), m(x)
    assert (maps >= 0).all()
    torch.testing.assert_close(
        maps.sum((2, 3)), torch.ones_like(maps[..., 0, 0]), atol=1e-5, rtol=0
    )
    assert (y >= x).all()
    assert (y <= 2 * x).all()
    weighted = (maps.repeat_interleave(4, 1) * x).sum((2, 3))
    torch.testing.assert_close((y - x).sum((2, 3)), weighted)


def test_oracle_3_groups_are_independent():
    m = module()
    x = torch.randn(2, 12, 5, 5, dtype=torch.float64)
    other = x.clone()
    other[:, 4:8] += torch.randn(2, 4, 5, 5, dtype=torch.float64)
    same = (m(x) == m(other)).flatten(2).all(2).all(0)
    assert same.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    jacobian = torch.autograd.functional.jacobian(m, x[:1, :, :3, :3])
    crossed = jacobian.view(3, 36, 3, 36).abs().amax((1, 3))
    assert torch.equal(crossed > 0, torch.eye(3, dtype=torch.bool))


def test_oracle_4_nothing_is_shared_between_groups():
    m = module(8, groups=2)
    for layer in (m.depthwise, m.depthwise_norm, m.pointwise, m.pointwise_norm):
        for values in (*layer.parameters(), *layer.buffers()):
            if values.dim():
                half = len(values) // 2
                values.data[half:] = values.data[:half]
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    maps = m.maps(x)
    assert not torch.allclose(maps[:, 0], maps[:, 1])
    twice = m.maps(torch.cat((x[:, :4], x[:, :4]), 1))
    assert torch.equal(twice[:, 0], twice[:, 1])
    assert torch.equal(twice[:, 0], maps[:, 0])


def test_oracle_5_permutations_and_flips():
    m = module()
    x = torch.randn(2, 12, 5, 5, dtype=torch.float64)
    y = m(x)
    moved = copy.deepcopy(m)
    order = torch.tensor([2, 0, 1])
    channels = (order[:, None] * 4 + torch.arange(4)).flatten()
    for layer, at in (
        (moved.depthwise, channels), (moved.depthwise_norm, channels),
        (moved.pointwise, order), (moved.pointwise_norm, order),
    ):  # fmt: skip
        for values in (*layer.parameters(), *layer.buffers()):
            if values.dim():
                values.data = values.data[at]
    assert torch.equal(moved(x[:, channels]), y[:, channels])
    for turn in (lambda t: t.flip(2), lambda t: t.flip(3), lambda t: t.rot90(1, (2, 3))):
        torch.testing.assert_close(m(turn(x)), turn(y), atol=1e-15, rtol=1e-14)
    inside = torch.zeros(2, 12, 9, 9, dtype=torch.float64)
    inside[:, :, 3:6, 3:6] = x[:, :, :3, :3]
    shifted = inside.roll((1, -1), (2, 3))
    torch.testing.assert_close(m(shifted), m(inside).roll((1, -1), (2, 3)))


def test_oracle_6_worked_examples():
    m = ULSAM(groups=1).build(1).double().eval()
    for layer in (m.depthwise, m.pointwise):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    for norm in (m.depthwise_norm, m.pointwise_norm):
        norm.eps = 0.0
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], dtype=torch.float64)
    torch.testing.assert_close(m(x), 1.25 * x)
    row = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]], dtype=torch.float64)
    e = math.e
    want = torch.tensor([e, e, 1, 1], dtype=torch.float64) / (2 * e + 2)
    assert want.tolist() == pytest.approx([0.36553, 0.36553, 0.13447, 0.13447], abs=1e-5)
    torch.testing.assert_close(m.maps(row).flatten(), want)
    assert m(row).flatten().tolist() == pytest.approx([1.36553, 0, 0, 0], abs=1e-5)


@pytest.mark.parametrize("norm_act", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_oracle_7_all_groups_at_once_are_each_by_itself(groups, train, norm_act):
    m = module(groups=groups, train=train, norm_act=norm_act)
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64, requires_grad=True)
    want = by_group(m, x)
    ours = m(x)
    torch.testing.assert_close(ours, want, atol=1e-6, rtol=0)
    inputs = (x, m.depthwise.weight, m.pointwise.weight)
    grads, wanted = (torch.autograd.grad(y.square().sum(), inputs) for y in (ours, want))
    for a, b in zip(grads, wanted):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_oracle_7_gradients_are_differences():
    m = module(6, groups=2)
    x = torch.randperm(72).view(1, 6, 3, 4).double() / 10
    assert torch.autograd.gradcheck(m, (x.requires_grad_(),))


def test_max_pool_pads_with_minus_infinity():
    """Without a ReLU all of a map may be negative: a zero from outside would win at its border."""
    m = ULSAM(groups=1, norm_act=False).build(1).eval()
    for layer in (m.depthwise, m.pointwise):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.full((1, 1, 4, 4), -3.0)
    torch.testing.assert_close(m.maps(x), torch.full_like(x, 1 / 16))


def test_oracle_8_counts_of_the_module():
    m = ULSAM(groups=4).build(512)
    weights = m.depthwise.weight.numel() + m.pointwise.weight.numel()
    assert weights == 1024
    assert macs(m, (1, 512, 14, 14)).total == 200_704
    assert parameters(m) - weights == 512 + 4 + 2 * 512 + 2 * 4
    assert {parameters(ULSAM(groups=g).build(512)) - 3 * g for g in (1, 2, 4, 8, 16)} == {2560}


def convolutions(model: nn.Module) -> int:
    """Weights of convolutions, as the block formulas count them."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))


IMAGE = (1, 3, 224, 224)
V1_BLOCK = (512 * 9 + 512 * 512, 14)
V2_BLOCKS = {  # weights, side
    64: (2 * 64 * 384 + 9 * 384, 14),
    96: (2 * 96 * 576 + 9 * 576, 14),
    160: (2 * 160 * 960 + 9 * 960, 7),
}


def test_oracle_8_mobilenet_v1():
    plain = MobileNetV1()
    assert plain.replaceable == (2, 4, 6, 7, 8, 9, 10, 12)
    assert [i for i in plain.replaceable if plain.places[i].inner == 512] == [6, 7, 8, 9, 10]
    full = macs(plain, IMAGE).total
    assert (parameters(plain), full) == (4_231_976, 568_740_352)  # 4.2 M, 569 M
    assert V1_BLOCK[0] == 266_752
    for at in (6, 8, 10):
        ours = MobileNetV1(replace=(at,))
        assert convolutions(plain) - convolutions(ours) == V1_BLOCK[0] - 1024
        assert full - macs(ours, IMAGE).total == V1_BLOCK[0] * 196 - 200_704
    assert (
        f"{(4.2e6 - V1_BLOCK[0] + 1024) / 1e6:.1f} {(569e6 - 52_283_392 + 200_704) / 1e6:.0f}"
        == (
            "3.9 517"  # the paper's row
        )
    )
    narrow = MobileNetV1(width=0.75, replace=(8,), ulsam=ULSAM(groups=1))
    counts = f"{parameters(narrow) / 1e6:.1f} {macs(narrow, IMAGE).total / 1e6:.0f}"
    assert counts == "2.4 296"  # the paper's row
    added = MobileNetV1(after=(8,))
    assert macs(added, IMAGE).total - full == 200_704


@pytest.mark.parametrize(
    ("replace", "params", "flops"),
    [
        ((), 3.40, 300.0),
        ((11,), 3.28, 277.34),
        ((15,), 3.08, 284.54),
        ((12, 8), 3.23, 267.06),
        ((14, 15), 2.77, 269.08),
        ((11, 14), 2.97, 261.88),
        ((11, 12, 14, 15), 2.54, 224.16),
    ],
)
def test_oracle_8_mobilenet_v2(replace, params, flops):
    """Our deltas are the block formulas', and subtracted from 3.4 M and 300 M the paper's rows."""
    plain, ours = MobileNetV2(), MobileNetV2(replace=replace)
    saved_weights = saved_macs = 0
    for at in replace:
        m = plain.places[at].inner
        weights, side = V2_BLOCKS[m]
        saved_weights += weights - 2 * m
        saved_macs += (weights - 2 * m) * side**2
    assert convolutions(plain) - convolutions(ours) == saved_weights
    full = macs(plain, IMAGE).total
    assert full - macs(ours, IMAGE).total == saved_macs
    assert (parameters(plain), full) == (3_504_872, 300_774_272)
    assert 3.4 - saved_weights / 1e6 == pytest.approx(params, abs=0.012)
    near = 0.5 if len(replace) == 4 else 0.02  # the last row is 0.4 M off, in the paper
    assert 300 - saved_macs / 1e6 == pytest.approx(flops, abs=near)


def test_the_sheets_small_network():
    """Its counts for digits: vanilla, a block deleted, and replaced with 1, 4 and 8 groups."""
    plan = ((64, 2), (64, 1), (64, 1), (64, 1), (128, 2))

    def net(plan=plan, **more):
        return parameters(MobileNetV1(10, channels=1, plan=plan, stem=(32, 1), **more))

    assert net() == 28_106
    assert net(plan[:1] + plan[2:]) == 23_178
    counts = [net(replace=(2,), ulsam=ULSAM(groups=g)) for g in (1, 4, 8)]
    assert counts == [23_501, 23_510, 23_522]


@pytest.mark.parametrize("kind", [MobileNetV1, MobileNetV2])
def test_mobilenets_train(kind):
    places = {MobileNetV1: (8,), MobileNetV2: (12,)}[kind]
    model = kind(10, width=0.25, replace=places, after=(0,), ulsam="ulsam(groups=2)")
    y = model(torch.randn(2, 3, 64, 64))
    assert y.shape == (2, 10)
    y.square().sum().backward()
    held = [m for m in model.modules() if isinstance(m, SubspaceAttention)]
    assert len(held) == 2
    for one in held:
        assert all(p.grad is not None for p in one.parameters())
        assert one.depthwise.weight.grad.abs().sum() > 0


def test_v2s_names_are_torchvisions():
    names = set(MobileNetV2().state_dict())
    for name in (
        "features.0.0.weight", "features.1.conv.0.0.weight", "features.1.conv.1.weight",
        "features.1.conv.2.running_var", "features.2.conv.1.0.weight", "features.2.conv.3.bias",
        "features.18.1.weight", "classifier.1.bias",
    ):  # fmt: skip
        assert name in names
    assert MobileNetV2(width=0.75).places[3].inner == 24


def test_bf16_is_within_its_rounding():
    m = module().float()
    x = torch.randn(2, 12, 6, 6)
    half = copy.deepcopy(m).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), m(x), atol=0.05, rtol=0.02)
    assert m(x[:0]).shape == (0, 12, 6, 6)


def test_what_is_refused():
    with pytest.raises(InputError, match="doesn't divide 10 channels"):
        make("ulsam(groups=4)").build(10)
    with pytest.raises(InputError, match="expected x"):
        module()(torch.randn(2, 11, 4, 4, dtype=torch.float64))
    with pytest.raises(InputError, match="momentum"):
        ULSAM(momentum=0.0)
    with pytest.raises(InputError, match="gain"):
        ULSAM(gain="two")
    with pytest.raises(InputError, match="another shape than its input"):
        MobileNetV1(replace=(5,))
    with pytest.raises(InputError, match="expected different numbers"):
        MobileNetV2(after=(17,))
    with pytest.raises(InputError, match="no module of subspace attention"):
        MobileNetV1(ulsam="full")
    with pytest.raises(InputError, match="ulsam"):
        make_attention("ulsam")
