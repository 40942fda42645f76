"""Feed-forward, experts, routers and blocks, each against a few lines by definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from foveate import Context, causal
from foveate.nn import Attention, Block, MoE, Router, SwiGLU
from foveate.ops.errors import InputError
from foveate.parts.norm import RMSNorm, rms

DIM = 24


def experts(score="softmax", count=6, k=3, **options):
    made = MoE(Router(DIM, count, k, score, **options), 16, shared=20, balance=0.5).double()
    return made


def by_definition(moe, x, weights):
    """Every expert on every token, times its weight, and the shared one."""
    out = moe.shared(x)
    for i, weight in enumerate(weights.unbind(-1)):
        inner = functional.silu(x @ moe.gate[i].T) * (x @ moe.up[i].T)
        out = out + weight[..., None] * (inner @ moe.down[i].T)
    return out


def test_swiglu():
    layer, x = SwiGLU(DIM, 40), torch.randn(2, 5, DIM)
    inner = functional.silu(x @ layer.gate.weight.T) * (x @ layer.up.weight.T)
    torch.testing.assert_close(layer(x), inner @ layer.down.weight.T)


def test_rms_norm():
    norm, x = RMSNorm(DIM, 1e-5), torch.randn(3, DIM)
    norm.weight.data.normal_()
    torch.testing.assert_close(norm(x), functional.rms_norm(x, (DIM,), norm.weight, 1e-5))
    assert rms(x.bfloat16(), 1e-5).dtype == torch.float32
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("renormalize", [False, True])
def test_step3_weights_are_the_softmax_over_all_experts(renormalize):
    moe = experts(renormalize=renormalize, scaling=1.5)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    probs = (x @ moe.router.weight.T).softmax(-1)
    best = probs.topk(3, -1)
    weights = torch.zeros_like(probs).scatter(-1, best.indices, best.values)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    y, aux = moe(x)
    torch.testing.assert_close(y, by_definition(moe, x, 1.5 * weights))
    assert float(aux["expert_load"].sum()) == pytest.approx(3)


def test_sigmoid_router_with_groups_and_a_bias_for_the_choice_only():
    moe = experts("sigmoid", 8, 3, groups=4, top_groups=2, renormalize=True)
    moe.router.bias.normal_()
    x = torch.randn(30, DIM, dtype=torch.float64)
    scores = (x @ moe.router.weight.T).sigmoid()
    routed = moe.router(x)
    for t in range(30):
        ranks = (scores[t] + moe.router.bias).tolist()
        groups = sorted(range(4), key=lambda g: -(ranks[2 * g] + ranks[2 * g + 1]))[:2]
        allowed = [e for g in groups for e in (2 * g, 2 * g + 1)]
        best = sorted(allowed, key=lambda e: -ranks[e])[:3]
        assert set(routed.chosen[t].nonzero()[:, 0].tolist()) == set(best)
        kept = scores[t, best] / scores[t, best].sum()
        torch.testing.assert_close(routed.weights[t, best], kept)


def test_balance_loss_in_training_only():
    moe, x = experts(), torch.randn(2, 9, DIM, dtype=torch.float64)
    y, aux = moe(x)
    p = (x @ moe.router.weight.T).softmax(-1).flatten(0, 1).mean(0)
    expected = 0.5 * 6 * (p * aux["expert_load"]).sum()
    torch.testing.assert_close(aux["expert_balance_loss"], expected)
    assert set(moe.eval()(x)[1]) == {"expert_load"}
    moe.train()
    real = torch.arange(9) < torch.tensor([[9], [4]])
    noise = x + 5 * ~real[..., None]
    for name, value in moe(x, real)[1].items():
        assert torch.equal(value, moe(noise, real)[1][name])


def test_gradients_reach_experts_and_router():
    moe, x = experts(), torch.randn(2, 40, DIM, dtype=torch.float64)
    moe(x)[0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in moe.parameters())


def test_block_is_pre_norm_with_residuals():
    block = Block(Attention(DIM, 2), SwiGLU(DIM, 40), eps=1e-5)
    x = torch.randn(2, 5, DIM)
    middle = x + block.attention(functional.rms_norm(x, (DIM,), eps=1e-5), mask=causal()).y
    expected = middle + block.feedforward(functional.rms_norm(middle, (DIM,), eps=1e-5))
    torch.testing.assert_close(block(x, Context(mask=causal())).y, expected)


def test_block_gathers_what_its_layers_tell():
    block = Block(Attention(DIM, 4, "moh(shared=1, active=2)"), experts().float())
    aux = block(torch.randn(2, 5, DIM), Context(mask=causal(), phase="train")).aux
    assert set(aux) == {
        "head_load", "head_balance_loss", "expert_load", "expert_balance_loss",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 7}, "1 to 6 experts"),
        ({"score": "relu"}, "'softmax' or 'sigmoid'"),
        ({"groups": 4}, "divisor of 6"),
        ({"groups": 3, "top_groups": 4}, "no more groups"),
        ({"groups": 3, "top_groups": 1, "top_k": 3}, "hold 2 experts"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(InputError, match=said):
        Router(**({"dim": DIM, "experts": 6, "top_k": 2} | options))
