"""BiFormer whole: counts equal to the spec's, maps for a pyramid, what timm asks of a backbone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from foveate.models import BiFormer, biformer_base, biformer_small, biformer_stl, biformer_tiny
from foveate.models.macs import macs, parameters
from foveate.ops.errors import InputError

IMAGE = (1, 3, 224, 224)


def small(**more) -> BiFormer:
    given = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128), "classes": 5, "head_dim": 16}
    torch.manual_seed(0)
    return BiFormer(**(given | {"regions": 4, "topk": (1, 2, 4, -2)} | more))


@pytest.mark.parametrize(
    ("make", "count", "giga"),
    [
        (biformer_tiny, 13_142_760, 2.215),
        (biformer_small, 25_536_232, 4.463),
        (biformer_base, 56_804_968, 9.758),
    ],
)
def test_oracle_7_parameters_and_multiply_adds(make, count, giga):
    model = make()
    assert parameters(model) == count
    found = macs(model, IMAGE)
    head = model.head.weight.numel()  # which the spec's figures leave out
    assert round((found.total - head) / 1e9, 3) == giga


def test_swin_layout_has_the_published_size():
    model = biformer_stl()
    assert f"{parameters(model) / 1e6:.1f} {macs(model, IMAGE).total / 1e9:.1f}" == "28.4 4.6"


def test_multiply_adds_against_torchs_counter():
    """All that torch sees, routing among it; attention itself by the spec's formula."""
    model = biformer_tiny()
    found = macs(model, IMAGE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(IMAGE))
    routed = [(2, 56, 64, 1), (2, 28, 128, 4), (8, 14, 256, 16)]
    routing = sum(depth * 49**2 * c for depth, _, c, _ in routed)
    attention = sum(
        depth * 2 * side**2 * (topk * side**2 // 49) * c for depth, side, c, topk in routed
    )
    assert 2 * (found.convolutions + found.linear + routing) == counter.get_total_flops()
    assert found.mixing == routing + attention + 2 * 2 * 49**2 * 512


def test_oracle_8_keys_a_query_sees():
    """64, 64, 64 and 49, counted where the op is called."""
    import foveate.nn.biformer as home

    seen = []
    real = home.attention

    def spy(q, k, v, *more, **options):
        layout = options.get("layout")
        seen.append(k.shape[2] if layout is None else int(layout.pairs / layout.q_len))
        return real(q, k, v, *more, **options)

    home.attention = spy
    try:
        with torch.no_grad():
            BiFormer((1, 1, 1, 1), head_dim=32, classes=2).eval()(torch.randn(IMAGE))
    finally:
        home.attention = real
    assert seen == [64, 64, 64, 49]


def test_names_are_those_of_the_released_weights():
    state = biformer_tiny().state_dict()
    for name, shape in {
        "downsample_layers.0.0.weight": (32, 3, 3, 3),
        "downsample_layers.0.4.running_mean": (64,),
        "downsample_layers.3.1.bias": (512,),
        "stages.0.1.pos_embed.weight": (64, 1, 3, 3),
        "stages.1.0.norm1.weight": (128,),
        "stages.2.7.attn.qkv.qkv.weight": (768, 256),
        "stages.2.7.attn.wo.bias": (256,),
        "stages.2.0.attn.lepe.weight": (256, 1, 5, 5),
        "stages.3.0.attn.qkv.weight": (1536, 512),
        "stages.3.1.attn.proj.bias": (512,),
        "stages.3.1.attn.lepe.bias": (512,),
        "stages.3.1.mlp.0.weight": (1536, 512),
        "stages.3.1.mlp.3.weight": (512, 1536),
        "norm.num_batches_tracked": (),
        "head.weight": (1000, 512),
    }.items():
        assert tuple(state[name].shape) == shape, name
    assert "stages.3.0.attn.qkv.bias" not in state


def test_the_pyramid():
    x = torch.randn(2, 3, 64, 96)
    plain, pyramid = small().eval(), small(pyramid=True).eval()
    missing = pyramid.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing.missing_keys} == {"extra_norms"}
    raw, normed = plain.features(x), pyramid(x)
    sizes = [(2, 16, 16, 24), (2, 32, 8, 12), (2, 64, 4, 6), (2, 128, 2, 3)]
    assert [tuple(one.shape) for one in raw] == [tuple(one.shape) for one in normed] == sizes
    for one, two in zip(raw, normed):
        want = nn.functional.layer_norm(one.permute(0, 2, 3, 1), (one.shape[1],), eps=1e-6)
        torch.testing.assert_close(two, want.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)
    sum(one.square().sum() for one in pyramid.train()(x)).backward()
    assert all(p.grad is not None for p in pyramid.parameters())


def test_what_timm_asks_of_a_backbone():
    model, x = small().eval(), torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    final, maps = model.forward_intermediates(x, [0, -1], norm=True)
    torch.testing.assert_close(final, features)
    torch.testing.assert_close(maps[1], features)
    torch.testing.assert_close(maps[0], model.features(x)[0])
    (only,) = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(only, model.features(x)[1])
    assert [info["num_chs"] for info in model.feature_info] == [16, 32, 64, 128]
    assert [x.shape[2] // m.shape[2] for m in model.features(x)] == [
        info["reduction"] for info in model.feature_info
    ]
    for info in model.feature_info:
        assert model.get_submodule(info["module"])
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert model.prune_intermediate_layers(2) == [2, 3]
    assert model.prune_intermediate_layers([1]) == [1]
    (only_again,) = model.forward_intermediates(x, [1], intermediates_only=True)
    torch.testing.assert_close(only_again, only)
    model.reset_classifier(3)  # on what is left
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize("side", [56, 75])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"pad": "reference"},
        {"topk": (-1, 0, 2, -2), "drop_path": 0.3},
        {"stem": "patches", "positions": 0, "mlp_ratio": 4, "lepe_on": "value"},
        {"regions": (4, 3, 2, 1), "scale": "head"},
    ],
)
def test_any_size_trains(side, more):
    model = small(**more).train()
    y = model(torch.randn(2, 3, side, side + 8))
    nn.functional.cross_entropy(y, torch.tensor([1, 3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_empty_batch():
    assert small().eval()(torch.randn(0, 3, 64, 64)).shape == (0, 5)


def test_checkpointing_changes_no_gradient():
    x = torch.randn(2, 3, 64, 64)
    found: list[list[torch.Tensor]] = []
    for enable in (False, True):
        model = small()
        model.set_grad_checkpointing(enable)
        runs: list[int] = []
        for stage in model.stages:
            stage[0].norm1.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        model(x).square().sum().backward()
        assert len(runs) == (8 if enable else 4)
        found.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*found):
        torch.testing.assert_close(one, two)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    block = small(drop_path=0.5).stages[3][0].train()
    assert block.drop_path == 0.5
    kept = block._some(torch.ones(4000, 1, 1, 1)).flatten()
    assert set(kept.tolist()) == {0.0, 2.0}
    assert float(kept.mean()) == pytest.approx(1, abs=0.1)
    assert torch.equal(block.eval()._some(torch.ones(3, 1, 1, 1)), torch.ones(3, 1, 1, 1))
    assert [b.drop_path for s in small(drop_path=0.4).stages for b in s] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4]
    )


@torch.no_grad()
def test_half_precision():
    model, x = small().eval(), torch.randn(2, 3, 64, 64)
    want = model(x)
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()
    assert float((half.float() - want).abs().max()) < 0.05


def test_what_is_refused():
    with pytest.raises(InputError, match="expected 4 numbers"):
        BiFormer(depths=(1, 1, 1))
    with pytest.raises(InputError, match="multiple of head_dim"):
        small(head_dim=24)
    with pytest.raises(InputError, match="expected images"):
        small()(torch.randn(2, 1, 64, 64))
    with pytest.raises(InputError, match="odd side"):
        small(positions=2)
    with pytest.raises(InputError, match="stem"):
        small(stem="none")
    with pytest.raises(InputError, match="stages are 0 to 3"):
        small().forward_intermediates(torch.randn(1, 3, 32, 32), [4])
