"""Step-3 in small: the released model's composition, by definition, decoded, trained, priced."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from foveate.models import FoveateForCausalLM, config_from, step3_config, weights_from
from foveate.ops.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))
from test_layouts import IDS, STEP3, step3_logits, step3_tensors  # noqa: E402

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size",
         "intermediate_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
         "shared_expert_intermediate_size", "max_position_embeddings")  # fmt: skip


def small(**changes):
    torch.manual_seed(0)
    return FoveateForCausalLM(step3_config(**changes)).eval()


def test_the_same_logits_as_the_sheets_algorithm_written_out():
    config = step3_config(
        vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, head_dim=16,
        query_rank=20, intermediate_size=40, num_experts=6, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    weights = step3_tensors()
    made = FoveateForCausalLM(config).double().eval()
    weights_from(made, "step3_text", weights.items())
    with torch.no_grad():
        torch.testing.assert_close(made(IDS).logits, step3_logits(weights, IDS))


def test_the_released_sizes_are_those_of_the_released_config():
    ours = step3_config(released=True)
    theirs = config_from(STEP3 | {
        "vocab_size": 128815, "hidden_size": 7168, "intermediate_size": 18432,
        "num_hidden_layers": 61, "num_attention_heads": 64, "head_dim": 256, "share_q_dim": 2048,
        "moe_num_experts": 48, "moe_top_k": 3, "moe_intermediate_size": 5120,
        "share_expert_dim": 5120, "moe_layers_enum": ",".join(map(str, range(4, 60))),
        "max_position_embedding": 65536,
    })  # fmt: skip
    for name in (*SIZES[:3], *SIZES[4:], "projection", "moe_layers", "rope_parameters",
                 "rms_norm_eps", "router_score", "router_renormalize"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    with torch.device("meta"):
        model = FoveateForCausalLM(ours)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e9, 1) == 316.3
    idle = 45 * 56 * 3 * 7168 * 5120
    assert round((count - idle) / 1e9, 1) == 38.8


def test_dense_layers_at_both_ends_and_experts_between():
    model = small()
    kinds = [type(layer.feedforward).__name__ for layer in model.model.layers]
    assert kinds == ["SwiGLU"] + ["MoE"] * 4 + ["SwiGLU"]
    moe = model.model.layers[2].feedforward
    assert moe.shared is not None
    weights = moe.router(torch.randn(9, 112)).weights
    assert ((weights > 0).sum(-1) == 3).all()
    assert (weights.sum(-1) < 1).all()  # of a softmax over all, not renormalised
    assert model.new_cache().layers[3].held.elements_per_token == 2 * 16
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 1.9


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_decoding_token_by_token_is_the_full_forward(dtype, most):
    model = small().to(dtype)
    ids = torch.randint(0, 256, (2, 21))
    with torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :13], use_cache=True)
        parts = [out.logits]
        for at in range(13, 21):
            out = model(ids[:, at : at + 1], past_key_values=out.past_key_values)
            parts.append(out.logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < most
    other = ids.clone()
    other[:, 15] = (other[:, 15] + 1) % 256
    if dtype == torch.float32:
        assert (model(other).logits - whole)[:, :15].abs().max() < most


def test_generates_the_same_beside_padding():
    model = small()
    ids = torch.randint(1, 256, (1, 7))
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), 1)
    mask = (torch.arange(10) >= 3).long()[None]
    alone = model.generate(ids, max_new_tokens=6, do_sample=False)
    beside = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(alone[0, 7:], beside[0, 10:])


def test_it_learns_and_balances_its_experts():
    model = small(num_hidden_layers=3, router_balance=0.01).train()
    ids = torch.arange(64).repeat(4, 1) * torch.tensor([[1], [3], [5], [7]]) % 256
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        out = model(ids, labels=ids)
        assert "expert_balance_loss" in out.aux
        out.loss.backward()
        moe = model.model.layers[1].feedforward
        assert moe.router.weight.grad.abs().sum() > 0
        assert moe.shared.gate.weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_saved_loaded_and_priced(tmp_path):
    from foveate.cost.config import read

    model = small()
    model.save_pretrained(tmp_path)
    again = FoveateForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    found = read(tmp_path)
    assert [one.kind for one in found.mixing] == ["mfa"] * 6
    assert found.sparsity == pytest.approx(4 / 13)
    step3_config(released=True).save_pretrained(tmp_path / "whole")
    whole = read(tmp_path / "whole")
    assert (whole.bytes(1), whole.linear, whole.feedforward) == _step3()


def _step3():
    from foveate.cost.released import RELEASED

    found = RELEASED["step-3"]()
    return found.bytes(1), found.linear, found.feedforward


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"dense_first": 6}, "6 layers"), ({"num_experts": 0}, "at least 1"),
     ({"dense_last": -1}, "at least 0"), ({"query_rank": 1.5}, "integer")],
)  # fmt: skip
def test_refusals(changes, says):
    with pytest.raises(InputError, match=says):
        step3_config(**changes)
