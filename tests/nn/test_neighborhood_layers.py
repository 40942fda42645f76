"""Neighborhood attention's modules and its function with the peer library's arguments."""

from __future__ import annotations

import inspect

import pytest
import torch

from foveate import attention, neighborhood
from foveate.nn import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    neighborhood_attention,
)
from foveate.ops.errors import InputError

RANKS = [
    (NeighborhoodAttention1D, (21,), {"kernel_size": 5, "stride": 2, "dilation": 3}),
    (NeighborhoodAttention2D, (9, 14), {"kernel_size": (4, 5), "dilation": (1, 2)}),
    (NeighborhoodAttention3D, (4, 6, 5), {"kernel_size": 3, "stride": (1, 2, 3),
                                          "is_causal": (True, False, False)}),
]  # fmt: skip


def by_hand(layer, x, given):
    shape = tuple(x.shape[1:-1])
    tokens = x.flatten(1, -2)
    qkv = (tokens @ layer.qkv.weight.T + layer.qkv.bias).unflatten(-1, (3, layer.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    names = {"kernel_size": "window", "is_causal": "causal"}
    mask = neighborhood(shape, **{names.get(n, n): value for n, value in given.items()})
    out = attention(q, k, v, mask, backend="reference").out.transpose(1, 2).flatten(-2)
    return (out @ layer.proj.weight.T + layer.proj.bias).view(x.shape)


@pytest.mark.parametrize(("kind", "shape", "given"), RANKS)
@pytest.mark.parametrize("form", ["fused", "unfused"])
def test_modules_are_attention_over_the_mask(kind, shape, given, form):
    layer = kind(24, 3, **given, form=form).double()
    x = torch.randn(2, *shape, 24, dtype=torch.float64, requires_grad=True)
    got, want = layer(x), by_hand(layer, x, given)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    weight = torch.randn_like(got)
    inputs = (x, *layer.parameters())
    for one, two in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((want * weight).sum(), inputs),
    ):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", [kind for kind, _, _ in RANKS])
def test_arguments_are_named_as_in_the_peer_library(kind):
    names = list(inspect.signature(kind).parameters)
    assert names[:9] == [
        "embed_dim", "num_heads", "kernel_size", "stride", "dilation", "is_causal", "qkv_bias",
        "qk_scale", "proj_drop",
    ]  # fmt: skip
    assert set(kind(8, 2, 3).state_dict()) == {
        "qkv.weight", "qkv.bias", "proj.weight", "proj.bias",
    }  # fmt: skip


def test_the_bias_of_relative_positions_is_learned():
    layer = NeighborhoodAttention2D(16, 2, (3, 5), rel_pos_bias=True)
    assert layer.rpb.shape == (2, 5, 9)
    layer(torch.randn(1, 6, 7, 16)).square().sum().backward()
    assert layer.rpb.grad.abs().sum() > 0
    with pytest.raises(InputError, match="unfused"):
        NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True, form="fused")


@pytest.mark.parametrize("form", ["fused", "unfused"])
@pytest.mark.parametrize("shape", [(13,), (5, 6), (3, 4, 4)])
def test_additional_tokens_are_seen_by_all(shape, form):
    n = torch.Size(shape).numel()
    q = torch.randn(2, *shape, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, *shape, 2, 8, dtype=torch.float64).requires_grad_().unbind(0)
    more_k, more_v = torch.randn(2, 2, 5, 2, 8, dtype=torch.float64).requires_grad_().unbind(0)
    got = neighborhood_attention(
        q, k, v, 3, additional_keys=more_k, additional_values=more_v, form=form
    )
    seen = torch.cat((neighborhood(shape, 3).dense(n, n)[0, 0], torch.ones(n, 5).bool()), 1)
    keys, values = (
        torch.cat((x.flatten(1, -3), y), 1).transpose(1, 2) for x, y in ((k, more_k), (v, more_v))
    )
    want = attention(q.flatten(1, -3).transpose(1, 2), keys, values, seen, backend="reference")
    torch.testing.assert_close(got.out.flatten(1, -3), want.out.transpose(1, 2))
    torch.testing.assert_close(got.lse.flatten(1, -2), want.lse.transpose(1, 2))
    inputs = (q, more_k, more_v)
    weight = torch.randn_like(got.out)
    ours = torch.autograd.grad((got.out * weight).sum(), inputs, retain_graph=True)
    flat = weight.flatten(1, -3).transpose(1, 2)
    theirs = torch.autograd.grad((want.out * flat).sum(), inputs)
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)


def test_a_scale_of_zero_is_a_value():
    x = torch.randn(1, 9, 1, 4)
    mean = neighborhood_attention(x, x, x, 9, scale=0.0).out
    torch.testing.assert_close(mean, x.mean(1, keepdim=True).expand_as(x))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="no multiple of num_heads"):
        NeighborhoodAttention1D(10, 3, 3)
    with pytest.raises(InputError, match="stride 4"):
        NeighborhoodAttention2D(8, 2, 3, stride=4)
    with pytest.raises(InputError, match="expected x of 4 axes"):
        NeighborhoodAttention2D(8, 2, 3)(torch.randn(1, 9, 8))
    with pytest.raises(InputError, match="axis 0 has 2 tokens"):
        NeighborhoodAttention1D(8, 2, 3)(torch.randn(1, 2, 8))
    q = torch.randn(1, 9, 2, 4)
    with pytest.raises(InputError, match="one grid"):
        neighborhood_attention(q, q[:, :8], q, 3)
    with pytest.raises(InputError, match="or neither"):
        neighborhood_attention(q, q, q, 3, additional_keys=q)
    for more in ({"q_tile_shape": (8,)}, {"kv_tile_shape": (8,)}, {"backend": "cpu"}):
        with pytest.raises(InputError, match="those of the fused form"):
            neighborhood_attention(q, q, q, 3, form="unfused", **more)
    with pytest.raises(InputError, match="expected 'fused', 'unfused' or None"):
        NeighborhoodAttention1D(8, 2, 3, form="naive")
    with pytest.raises(InputError, match="num_heads=0"):
        NeighborhoodAttention1D(8, 0, 3)
    with pytest.raises(InputError, match="has no bias"):
        neighborhood_attention(q, q, q, 3, rpb=torch.zeros(2, 5))


@pytest.mark.parametrize(("form", "rel_pos_bias"), [("fused", False), ("unfused", True)])
def test_compiled_modules_are_the_modules(form, rel_pos_bias):
    """The fused one is one graph; the unfused one, which builds tables, breaks it."""
    torch._dynamo.reset()
    layer = NeighborhoodAttention2D(16, 2, (3, 5), form=form, rel_pos_bias=rel_pos_bias)
    x = torch.randn(2, 6, 7, 16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=form == "fused", backend="aot_eager")
    got, want = compiled(x), layer(x)
    torch.testing.assert_close(got, want)
    inputs = (x, *layer.parameters())
    for one, two in zip(
        torch.autograd.grad(got.square().sum(), inputs),
        torch.autograd.grad(want.square().sum(), inputs),
    ):
        torch.testing.assert_close(one, two)
