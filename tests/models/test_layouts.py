"""Released weights: transformers' DeepSeek-V3 and a Step-3 written out give the same logits."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

from foveate.ops.errors import InputError

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from foveate.models import (  # noqa: E402
    FoveateForCausalLM,
    config_from,
    load_layout,
    weights_from,
)

IDS = torch.randint(1, 50, (2, 21), generator=torch.Generator().manual_seed(1))


def deepseek(**options):
    torch.manual_seed(0)
    given = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
        "kv_lora_rank": 16, "q_lora_rank": 20, "qk_rope_head_dim": 6, "qk_nope_head_dim": 10,
        "v_head_dim": 8, "first_k_dense_replace": 1, "initializer_range": 0.3,
        "attn_implementation": "eager",
    }  # fmt: skip
    config = transformers.DeepseekV3Config(**(given | options))
    made = transformers.DeepseekV3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, buffer in made.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
        for name, parameter in made.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def ours(theirs) -> FoveateForCausalLM:
    made = FoveateForCausalLM(config_from(theirs.config)).eval()
    return weights_from(made, "deepseek_v3", theirs.state_dict().items())


YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {}, {"q_lora_rank": None}, {"rope_interleave": False}, {"attention_bias": True},
        {"rope_parameters": YARN}, {"rope_parameters": YARN | {"mscale_all_dim": 0.7}},
        {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}, {"tie_word_embeddings": True},
    ],
    ids=str,
)  # fmt: skip
def test_deepseek_v3_has_the_same_logits(options):
    theirs = deepseek(**options)
    made = ours(theirs)
    with torch.no_grad():
        expected = theirs(IDS).logits
        assert (made(IDS).logits - expected).abs().max() < 1e-5 * expected.abs().max()
        assert expected.std() > 0.1


def test_deepseek_v3_generates_the_same():
    theirs = deepseek()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(IDS, **options)
    out = ours(theirs).generate(IDS, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, expected)
    assert out.past_key_values.layers[0].held.elements_per_token == 16 + 6


def published(theirs):
    """The tensors as in DeepSeek's own files: one per expert, and further-token layers."""
    out = {}
    for name, tensor in theirs.state_dict().items():
        head, _, tail = name.partition("experts.")
        if tail == "gate_up_proj":
            for i, both in enumerate(tensor):
                gate, up = both.chunk(2)
                out[f"{head}experts.{i}.gate_proj.weight"] = gate.contiguous()
                out[f"{head}experts.{i}.up_proj.weight"] = up.contiguous()
        elif tail == "down_proj":
            for i, down in enumerate(tensor):
                out[f"{head}experts.{i}.down_proj.weight"] = down.contiguous()
        else:
            out[name] = tensor
    out["model.layers.3.eh_proj.weight"] = torch.zeros(2, 2)
    return out


def test_a_folder_as_deepseek_publishes_it(tmp_path):
    theirs = deepseek()
    theirs.config.save_pretrained(tmp_path)
    tensors = published(theirs)
    names = sorted(tensors)
    for part in range(2):
        some = {n: tensors[n].contiguous() for n in names[part::2]}
        safetensors.save_file(some, tmp_path / f"model-{part + 1}-of-2.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(
            load_layout(tmp_path)(IDS).logits, theirs(IDS).logits, atol=2e-5, rtol=1e-5
        )


# -- Step-3 ----------------------------------------------------------------------------------------
STEP3 = {
    "model_type": "step3_text", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 3, "head_dim": 16, "share_q_dim": 20,
    "moe_num_experts": 6, "moe_top_k": 3, "moe_intermediate_size": 16, "share_expert_dim": 16,
    "norm_expert_weight": False, "moe_layers_enum": "1", "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0, "max_position_embedding": 128,
}  # fmt: skip


def step3_tensors():
    """Random weights under the released model's names."""
    torch.manual_seed(0)
    shapes = {"model.embed_tokens.weight": (50, 24), "lm_head.weight": (50, 24)}
    shapes["model.norm.weight"] = (24,)
    for i in range(3):
        at = f"model.layers.{i}."
        shapes |= {
            at + "input_layernorm.weight": (24,), at + "post_attention_layernorm.weight": (24,),
            at + "self_attn.q_proj.weight": (20, 24), at + "self_attn.inter_norm.weight": (20,),
            at + "self_attn.wq.weight": (48, 20), at + "self_attn.k_proj.weight": (16, 24),
            at + "self_attn.v_proj.weight": (16, 24), at + "self_attn.o_proj.weight": (24, 48),
        }  # fmt: skip
        mlp = at + ("share_expert." if i == 1 else "mlp.")
        width = 16 if i == 1 else 40
        shapes |= {
            mlp + "gate_proj.weight": (width, 24), mlp + "up_proj.weight": (width, 24),
            mlp + "down_proj.weight": (24, width),
        }  # fmt: skip
        if i == 1:
            shapes |= {
                at + "moe.gate.weight": (6, 24), at + "moe.gate_proj.weight": (6, 16, 24),
                at + "moe.up_proj.weight": (6, 16, 24), at + "moe.down_proj.weight": (6, 24, 16),
            }  # fmt: skip
    out = {n: torch.randn(s, dtype=torch.float64) * s[-1] ** -0.5 for n, s in shapes.items()}
    for name in out:
        if "norm" in name:
            out[name] = out[name] + 1
    return out


def step3_logits(w, ids):
    """The spec's algorithm A and D, token mixing and experts written out."""

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def swiglu(x, gate, up, down):
        return (functional.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT

    def rotated(x):
        angle = torch.arange(x.shape[-2])[:, None] * 500_000.0 ** (
            -torch.arange(8, dtype=torch.float64) / 8
        )
        a, b = x[..., :8], x[..., 8:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    x = w["model.embed_tokens.weight"][ids]
    length = ids.shape[1]
    for i in range(3):
        at = f"model.layers.{i}."
        h = norm(x, w[at + "input_layernorm.weight"])
        z = norm(h @ w[at + "self_attn.q_proj.weight"].T, w[at + "self_attn.inter_norm.weight"])
        q = rotated((z @ w[at + "self_attn.wq.weight"].T).unflatten(-1, (3, 16)).transpose(1, 2))
        k = rotated(h @ w[at + "self_attn.k_proj.weight"].T)[:, None]
        v = (h @ w[at + "self_attn.v_proj.weight"].T)[:, None]
        s = q @ k.mT / 4
        s = s.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        o = (s.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + o @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, w[at + "post_attention_layernorm.weight"])
        name = at + ("share_expert." if i == 1 else "mlp.")
        x = x + swiglu(h, *(w[f"{name}{part}_proj.weight"] for part in ("gate", "up", "down")))
        if i == 1:
            p = (h @ w[at + "moe.gate.weight"].T).softmax(-1)
            best = p.topk(3, -1)
            for e in range(6):
                share = (best.values * (best.indices == e)).sum(-1, keepdim=True)
                parts = (w[f"{at}moe.{part}_proj.weight"][e] for part in ("gate", "up", "down"))
                x = x + share * swiglu(h, *parts)
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def test_step3_has_the_same_logits():
    weights = step3_tensors()
    made = FoveateForCausalLM(config_from(STEP3)).double().eval()
    weights_from(made, "step3_text", weights.items())
    with torch.no_grad():
        torch.testing.assert_close(made(IDS).logits, step3_logits(weights, IDS))
    assert made.new_cache().layers[0].held.elements_per_token == 32


def test_a_folder_as_step3_publishes_it(tmp_path):
    nested = {"model_type": "step3_vl", "text_config": STEP3}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    weights = step3_tensors() | {"vision_model.patch.weight": torch.zeros(3)}
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    made = load_layout(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(made(IDS).logits, step3_logits(weights, IDS))


def test_step3_config_as_released():
    released = STEP3 | {
        "num_hidden_layers": 61, "moe_layers_enum": ",".join(map(str, range(4, 60))),
    }  # fmt: skip
    made = config_from(released)
    assert made.moe_layers == list(range(4, 60))
    assert made.rope_parameters["rope_theta"] == 500_000.0
    assert (made.router_score, made.router_renormalize) == ("softmax", False)


# -- what doesn't fit ------------------------------------------------------------------------------
def test_refusals(tmp_path):
    weights = step3_tensors()
    made = FoveateForCausalLM(config_from(STEP3))
    with pytest.raises(InputError, match="layout isn't known"):
        config_from({"model_type": "gpt_neox"})
    with pytest.raises(InputError, match="lacks 'num_attention_heads'"):
        config_from({"model_type": "llama"})
    with pytest.raises(InputError, match="has no place"):
        weights_from(made, "step3_text", [("model.layers.0.self_attn.qkv.weight", weights)])
    with pytest.raises(InputError, match="another config"):
        weights_from(made, "step3_text", [("lm_head.weight", torch.zeros(3, 3))])
    with pytest.raises(InputError, match="which this model doesn't have"):
        weights_from(made, "step3_text", [("model.layers.0.moe.gate.weight", torch.zeros(6, 24))])
    del weights["model.norm.weight"]
    with pytest.raises(InputError, match=r"1 weights weren't .* model.norm.weight"):
        weights_from(made, "step3_text", weights.items())
    with pytest.raises(InputError, match="no config.json"):
        load_layout(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(STEP3))
    with pytest.raises(InputError, match="no safetensors"):
        load_layout(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(STEP3 | {"quantization_config": {"bits": 8}}))
    with pytest.raises(InputError, match="quantised"):
        load_layout(tmp_path)
