"""The classifier on a frozen encoder's layers, its modules, and the plot of a gate's importance."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from foveate.methods.gaam import GaussianGate
from foveate.models import GAT
from foveate.models.gat import (
    GaussianBlock,
    LayerAttention,
    draw_importance,
    grid_of,
    importance_of,
    layer_features,
)
from foveate.ops.errors import InputError

N, D = 6, 32


def modules():
    density = {"form": "density", "features": D}
    return {
        "identity": None,
        "DAAMv1": GaussianGate(3, **density),
        "DAAMv2": GaussianGate(1, **density),
        "package": GaussianBlock([GaussianGate(2, 3), GaussianGate(4, 2, axis=2)]),
        "MHA": LayerAttention(D, 4),
        "MHA + BN": LayerAttention(D, 4, norm=True),
        "GQGAAM": LayerAttention(D, 8, 2, gate=GaussianGate(3, **density)),
    }


@pytest.mark.parametrize("name", modules())
def test_every_module_is_trained_through(name):
    model = GAT(N, D, 5, modules()[name], channels=16)
    logits = model(torch.randn(4, N, D))
    assert logits.shape == (4, 5)
    functional.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.grad.abs().sum() for p in model.module.parameters()) > 0 or name == "identity"


def test_the_head_by_hand():
    model, x = GAT(N, D, 5, channels=7), torch.randn(2, N, D)
    y = x.reshape(2, N, 4, 8)
    y = functional.conv2d(y, model.first.weight, model.first.bias, padding=1).relu()
    y = functional.conv2d(y, model.second.weight, model.second.bias, padding=1).relu()
    expected = y.reshape(2, -1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected)
    assert [grid_of(n) for n in (5120, 1024, 64, 7)] == [(64, 80), (32, 32), (8, 8), (1, 7)]


def test_layer_attention_is_multi_head_attention():
    made, x = LayerAttention(D, 4).double(), torch.randn(3, N, D).double()
    theirs = nn.MultiheadAttention(D, 4, batch_first=True).double()
    p = made.attention.projection
    with torch.no_grad():
        parts = [p.query(x), *p.expand(p.entries(x))]
        weights = dict(p.named_parameters())
        linears = [m for m in p.modules() if isinstance(m, nn.Linear)]
        assert len(linears) == 4, weights.keys()
        theirs.in_proj_weight.copy_(torch.cat([m.weight for m in linears[:3]]))
        theirs.in_proj_bias.copy_(torch.cat([m.bias for m in linears[:3]]))
        theirs.out_proj.weight.copy_(linears[3].weight)
        theirs.out_proj.bias.copy_(linears[3].bias)
    assert parts[0].shape == (3, 4, N, D // 4)
    torch.testing.assert_close(made(x), theirs(x, x, x)[0])


def test_a_gate_has_a_thousandth_of_attentions_parameters():
    """The spec: 2 H D' against 4 d^2, at WavLM-Large's 1,024 features."""
    gate = GaussianGate(8, form="density", features=1024)
    counts = [sum(p.numel() for p in m.parameters()) for m in (gate, LayerAttention(1024))]
    assert counts == [2 * 8 * 1024, 4 * 1024**2 + 4 * 1024]


def test_block_of_gates_keeps_its_residuals():
    gates = [GaussianGate(2, 3), GaussianGate(4, 2, axis=2)]
    x = torch.randn(3, N, D)
    first = x + gates[0](x)
    assert torch.equal(GaussianBlock(gates)(x), first + gates[1](first))


def test_layer_features_leave_padding_out():
    states = torch.randn(3, 2, 5, D).unbind(0)
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    found = layer_features(states, real)
    assert found.shape == (2, 3, D)
    torch.testing.assert_close(found[1, 2], states[2][1, :2].mean(0))
    torch.testing.assert_close(found[0], layer_features(states)[0])
    with pytest.raises(InputError, match="one layer or more"):
        layer_features([])


def test_features_of_a_frozen_encoder():
    pytest.importorskip("transformers")
    from foveate.models import FoveateEncoder, FoveateEncoderConfig

    config = FoveateEncoderConfig(
        vocab_size=31, hidden_size=D, num_hidden_layers=N, num_attention_heads=4
    )
    encoder, mask = FoveateEncoder(config).eval(), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    with torch.no_grad():
        out = encoder(torch.randint(1, 31, (2, 9)), mask, output_hidden_states=True)
    x = layer_features(out.hidden_states[1:], mask)
    assert x.shape == (2, N, D)
    torch.testing.assert_close(x[:, -1], out.pooler_output)
    assert GAT(N, D, 3, GaussianGate(2))(x).shape == (2, 3)


def test_importance_can_be_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    gate = GaussianGate(3, form="density", features=D)
    batches = torch.randn(4, 8, N, D).unbind(0)
    seen = importance_of(gate, batches)
    assert seen.count == 32
    torch.testing.assert_close(
        seen.mean.float(), gate.weights(torch.cat(batches)).mean(0).detach(), atol=1e-6, rtol=0
    )
    path = draw_importance(seen.factor, tmp_path / "deep" / "importance.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"expected \(layers, features\)"):
        draw_importance(torch.ones(2, 3, 4), path)


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match=r"expected \(B, 6, 32\)"):
        GAT(N, D, 5)(torch.randn(2, D, N))
