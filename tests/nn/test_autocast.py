"""Layers under autocast: bf16 arithmetic from fp32 weights, in training and in decoding."""

import pytest
import torch

import foveate
from foveate import causal

PROJECTIONS = (
    "mha", "gqa(kv_heads=2)", "mfa(head_dim=16, query_rank=16)",
    "mfa-kr(head_dim=16, query_rank=16)", "mla(latent=16, rope_dim=4)",
    "tpla(latent=16, rope_dim=4)", "sqa(query_heads=2, kv_heads=1)", "moh(shared=1, active=2)",
)  # fmt: skip
ATTENTIONS = (
    "sink-window(sinks=2, window=12)", "dma(window=8)", "combiner(size=8)", "lucid(block=16)",
    "flowformer(chunk=8)", "sea(k=8, width=16, max_length=64)", "rcmha", "tensor-attention",
    "routing-transformer(clusters=4, window=10, block=8)", "superlinear(spans=2)",
)  # fmt: skip
CASES = [(p, "full") for p in PROJECTIONS] + [("mha", a) for a in ATTENTIONS]


@pytest.mark.parametrize(("projection", "attention"), CASES)
def test_under_autocast_it_is_the_same_within_bf16(projection, attention):
    torch.manual_seed(1)
    layer = foveate.Attention(48, 4, projection, attention)
    x = torch.randn(2, 40, 48, requires_grad=True)
    torch.manual_seed(5)
    want = layer(x, mask=causal()).y
    (right,) = torch.autograd.grad(want.sum(), x)
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x, mask=causal()).y
    assert got.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(got.float().sum(), x)
    assert _apart(got.float(), want) < 0.03
    assert _apart(grad, right) < 0.05
    layer.eval()
    cache = layer.new_cache()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x[:, :39], mask=causal(), cache=cache)
        last = layer(x[:, 39:], mask=causal(), cache=cache).y
    assert len(cache) == 40
    assert torch.isfinite(last).all()


def _apart(got, want):
    """Relative error of the median row."""
    return ((got - want).norm(dim=-1) / want.norm(dim=-1)).median()
