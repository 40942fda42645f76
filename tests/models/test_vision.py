"""The diffusion transformer and the image backbone: local attention, order of tokens, gradients."""

from __future__ import annotations

import pytest
import torch

from foveate import neighborhood
from foveate.methods.fna import FNA
from foveate.models import NAT, DiT
from foveate.nn import NeighborhoodAttention2D
from foveate.ops.errors import InputError
from foveate.parts import Attention

SIZES = [((8, 12), (1, 1)), ((4, 8, 12), (1, 2, 2)), ((6, 5, 7), (1, 1, 1))]


class Masked(Attention):
    """The reference under a dense mask, tokens row by row."""

    def __init__(self, allowed):
        self.allowed = allowed

    def __call__(self, q, k, v, ctx=None):
        from foveate import attention

        return attention(q, k, v, self.allowed, backend="reference", scale=ctx.scale)


def dit(sizes, patch, attention="full", **more):
    torch.manual_seed(0)
    model = DiT(sizes, patch, channels=2, dim=24, depth=2, num_heads=2, attention=attention, **more)
    for parameter in model.parameters():  # the gates begin closed
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def data(sizes, text=0):
    more = (torch.randn(2, text, 5),) if text else ()
    return torch.randn(2, 2, *sizes), torch.tensor([3.0, 700.0]), *more


@pytest.mark.parametrize(("sizes", "patch"), SIZES)
@pytest.mark.parametrize("text", [0, 3])
def test_dit_is_attention_over_the_mask_in_whichever_order_its_tokens_are(sizes, patch, text):
    more = {"text_tokens": text, "text_dim": 5} if text else {}
    model = dit(sizes, patch, "gna(window=3, stride=2)", **more).double()
    inputs = tuple(x.double() for x in data(sizes, text))
    order = model.order()
    assert order is not None
    assert torch.equal(order.sort().values, torch.arange(len(order)))
    n = len(order) - text
    allowed = torch.ones(n + text, n + text, dtype=torch.bool)
    allowed[:n, :n] = neighborhood(model.grid, 3, 2).dense(n, n)[0, 0]
    local = model(*inputs)
    grads = torch.autograd.grad(local.square().sum(), list(model.parameters()))
    model.swap(Masked(allowed))
    assert model.order() is None
    want = model(*inputs)
    torch.testing.assert_close(local, want, atol=1e-9, rtol=1e-9)
    wanted = torch.autograd.grad(want.square().sum(), list(model.parameters()))
    for one, two in zip(grads, wanted):
        torch.testing.assert_close(
            one, two, atol=1e-9 * max(1.0, float(two.abs().max())), rtol=1e-9
        )


def test_dit_starts_as_a_prediction_of_zero_and_keeps_shapes():
    model = DiT((4, 6, 8), (1, 2, 2), channels=3, attention="fna(window=(2, 3, 3))")
    x = torch.randn(2, 3, 4, 6, 8)
    assert torch.equal(model(x, torch.zeros(2)), torch.zeros_like(x))


@pytest.mark.parametrize(("sizes", "patch"), SIZES)
def test_dit_cuts_and_joins_patches(sizes, patch):
    model, x = dit(sizes, patch), data(sizes)[0]
    tokens = model._cut(x)
    assert torch.equal(model._join(tokens), x)
    first = x[(0, slice(None), *(slice(0, p) for p in patch))]
    assert torch.equal(tokens[0, 0], first.flatten())


def test_tokens_stay_where_they_are_unless_all_layers_agree():
    local, other = FNA(window=3), FNA(window=3, dilation=2)
    assert dit((8, 12), (1, 1), [local, local]).order() is not None
    for pair in ([local, "full"], [local, other], [other, other]):
        model = dit((8, 12), (1, 1), pair)
        assert model.order() is None
        assert model(*data((8, 12))).isfinite().all()


def test_swapping_keeps_the_weights():
    model = dit((8, 8), (1, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = data((8, 8))
    dense = model(*x)
    assert not torch.allclose(model.swap("fna(window=3)")(*x), dense)
    torch.testing.assert_close(model.swap("fna(window=8)")(*x), dense)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dit_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="evenly"):
        DiT((9, 8), (2, 2))
    with pytest.raises(InputError, match="axis 0 has 4 tokens"):
        DiT((4, 8), (1, 1), attention="fna(window=5)")
    with pytest.raises(InputError, match="3 attentions for 4 blocks"):
        DiT((8, 8), (1, 1), attention=["full"] * 3)
    model = DiT((8, 8), (1, 1))
    with pytest.raises(InputError, match="expected x"):
        model(torch.randn(1, 3, 8, 7), torch.zeros(1))
    with pytest.raises(InputError, match="0 tokens of text"):
        model(torch.randn(1, 3, 8, 8), torch.zeros(1), torch.randn(1, 2, 5))


@pytest.mark.parametrize("dilated", [False, True])
@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_nat(dilated, rel_pos_bias):
    model = NAT(
        32, 5, dim=16, depths=(2, 2), head_dim=8, dilated=dilated, rel_pos_bias=rel_pos_bias
    )
    x = torch.randn(2, 3, 32, 32)
    assert [tuple(f.shape) for f in model.features(x)] == [(2, 8, 8, 16), (2, 4, 4, 32)]
    logits = model(x)
    assert logits.shape == (2, 5)
    (logits.square().sum() + model.features(x)[0].square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    layers = [m for m in model.modules() if isinstance(m, NeighborhoodAttention2D)]
    spread = [layer.dilation[0] for layer in layers]
    assert spread == ([1, 2, 1, 1] if dilated else [1] * 4)
    assert {layer.form for layer in layers} == {"unfused" if rel_pos_bias else "fused"}


def test_nat_learns_light_from_dark():
    model = NAT(32, 2, channels=1, dim=16, depths=(1, 1), head_dim=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        light = torch.randint(2, (16,))
        x = torch.randn(16, 1, 32, 32) + (light - 0.5)[:, None, None, None]
        loss = torch.nn.functional.cross_entropy(model(x), light)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_nat_refuses_sizes_that_do_not_fit():
    with pytest.raises(InputError, match="ends as 2 tokens"):
        NAT(16, depths=(1, 1), window=3)
    with pytest.raises(InputError, match="no multiple of head_dim"):
        NAT(32, dim=20, depths=(1,), head_dim=16)
    with pytest.raises(InputError, match="expected x"):
        NAT(32, depths=(1,))(torch.randn(1, 3, 16, 16))
