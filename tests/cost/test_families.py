"""Any config.json: counts against transformers' own classes, built and run."""

from __future__ import annotations

import json

import pytest
import torch
from families import BASE, FAMILIES, MLA

from foveate.cost.config import layer_kinds, matrices_of_class, read
from foveate.cost.fields import Given
from foveate.ops.errors import InputError

transformers = pytest.importorskip("transformers")


def folder_of(tmp_path, kind, values, filled=False):
    """A folder with a config as people write it, or as transformers saves it."""
    values = {"model_type": kind} | values
    if filled:
        values = transformers.CONFIG_MAPPING[kind].from_dict(values).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    return tmp_path


@pytest.mark.parametrize("kind", FAMILIES)
def test_weights_are_those_of_transformers_own_class(kind, tmp_path):
    """To the last number: attention or state of every layer, experts, embedding and head."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers has no such model")
    folder = folder_of(tmp_path, kind, FAMILIES[kind])
    theirs = matrices_of_class(folder)
    assert theirs
    assert read(folder).parameters == theirs
    assert read(folder_of(tmp_path, kind, FAMILIES[kind], filled=True)).parameters == theirs


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "falcon", "mixtral", "qwen3_next",
                                  "minimax", "lfm2"])  # fmt: skip
def test_caches_hold_what_transformers_own_cache_holds(kind, tmp_path):
    """Numbers kept after a prompt of 4 tokens, shorter than any window."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers has no such model")
    config = transformers.CONFIG_MAPPING[kind](**FAMILIES[kind])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        out = model(torch.tensor([[1, 2, 3, 4]]), use_cache=True)
    tensors, seen = [], set()

    def walk(x):
        if isinstance(x, torch.Tensor):
            if x.dim() >= 3:
                tensors.append(x)
        elif isinstance(x, dict):
            for y in x.values():
                walk(y)
        elif isinstance(x, list | tuple):
            for y in x:
                walk(y)
        elif type(x).__module__.startswith("transformers") and id(x) not in seen:
            seen.add(id(x))
            walk(vars(x))

    walk(out.past_key_values)
    theirs = sum(x.numel() for x in tensors)
    ours = read(folder_of(tmp_path, kind, FAMILIES[kind]))
    held = sum(part.kv * 4 + part.state for part in ours.mixing)
    assert held == theirs


def test_windows_and_chunks_by_layer(tmp_path):
    found = read(folder_of(tmp_path, "gemma3_text", FAMILIES["gemma3_text"]))
    assert [one.window for one in found.mixing] == [5, 5, 5, 5]
    found = read(folder_of(tmp_path, "gpt_oss", FAMILIES["gpt_oss"]))
    assert [one.window for one in found.mixing] == [5, None, 5, None]
    found = read(folder_of(tmp_path, "llama4_text", FAMILIES["llama4_text"]))
    assert [(one.window, one.chunked) for one in found.mixing] == [(5, True)] * 3 + [(None, False)]
    one = found.mixing[0]
    assert [one.seen(n) for n in (3, 5, 9)] == [3, 5, 5]


def test_an_indexer_reads_all_keys_and_attention_the_best(tmp_path):
    found = read(folder_of(tmp_path, "deepseek_v32", FAMILIES["deepseek_v32"]))
    picked, index = found.layers[1].mixing
    assert [picked.seen(n) for n in (5, 6, 100)] == [5, 6, 6]
    assert picked.held(100, 1) == 100 * (32 + 8)
    assert picked.bytes(100, 1) == 6 * (32 + 8)
    assert (index.bytes(100, 1), index.flops(1)) == (1600, 2 * 2 * 17)
    assert index.on_rank(2).kv == 16
    assert index.on_rank(2).pair == 2 * 17


def test_an_unknown_type_is_read_as_it_stands(tmp_path):
    found = read(folder_of(tmp_path, "never-seen", BASE))
    assert found.parameters == 135_680
    assert found.bytes(10, 2.0) == 4 * 2 * 2 * 16 * 10 * 2
    step3 = BASE | {
        "head_dim": 24, "share_q_dim": 20, "moe_num_experts": 6, "moe_top_k": 3,
        "moe_intermediate_size": 16, "share_expert_dim": 16, "moe_layers_enum": "1,2",
    }  # fmt: skip
    found = read(folder_of(tmp_path, "step3_text", step3))
    assert [one.kind for one in found.mixing] == ["mfa"] * 4
    assert found.mixing[0].kv == 2 * 24
    assert [layer.feedforward.activated for layer in found.layers] == [96, 64, 64, 96]
    nested = {"text_config": {"model_type": "step3_text"} | step3}
    assert read(folder_of(tmp_path, "step3_vl", nested)).layers == found.layers


def test_the_text_part_takes_its_type_from_the_whole(tmp_path):
    """As in Step-3's release, whose text part has no model_type and calls h_kv groups."""
    inner = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
    inner |= {"head_dim": 24, "num_attention_groups": 1}
    nested = {"text_config": inner | {"share_q_dim": 20}, "tie_word_embeddings": True}
    found = read(folder_of(tmp_path, "step3_vl", nested))
    assert {one.kind for one in found.mixing} == {"mfa"}
    assert found.tied
    grouped = read(folder_of(tmp_path, "step1", inner))
    assert [one.kv for one in grouped.mixing] == [2 * 24] * 4
    # What the text part leaves out on purpose stays out: no query latent.
    text = {"model_type": "deepseek_v3"} | FAMILIES["deepseek_v2"]
    nested = read(folder_of(tmp_path, "some_vl", {"text_config": text}))
    assert nested.layers == read(folder_of(tmp_path, "deepseek_v3", text)).layers


def test_an_indexer_shows_by_its_fields(tmp_path):
    """Also where neither the file nor a class of transformers lists the layers."""
    values = FAMILIES["deepseek_v32"]
    known = read(folder_of(tmp_path, "deepseek_v32", values))
    assert read(folder_of(tmp_path, "never-seen", values)).layers == known.layers


def test_smollm2_by_hand(tmp_path):
    """A config that no preset has: 30 layers, 9 heads on 3, 134.5 million weights."""
    smollm2 = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    }  # fmt: skip
    found = read(folder_of(tmp_path, "llama", smollm2))
    norms = 61 * 576
    assert found.parameters + norms == 134_515_008
    assert found.bytes(8192, 2.0) == 30 * 2 * 3 * 64 * 2 * 8192
    assert found.attention(8192) == 30 * 4 * 576 * 8192


def test_foveates_own_models(tmp_path):
    from foveate.models import FoveateConfig, FoveateForCausalLM

    config = FoveateConfig(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=50,
        projection=["mfa(head_dim=24, query_rank=20)", "mla(latent=32, rope_dim=8, head_dim=12)",
                    "gqa(kv_heads=2)", "mfa-kr(head_dim=24)"],
        attention=["full", "full", "sink-window(sinks=2, window=6)", "full"],
        moe_layers=[1, 2], num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = read(tmp_path)
    with torch.device("meta"):
        model = FoveateForCausalLM(config)
    theirs = sum(p.numel() for n, p in model.named_parameters()
                 if p.dim() > 1 and "router" not in n)  # fmt: skip
    assert found.parameters == theirs
    caches = [layer.attention.new_cache().elements_per_token for layer in model.model.layers]
    assert [one.kv for one in found.mixing] == caches
    assert found.mixing[2].window == 8


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        ("longcat_flash", BASE, "two attentions"),
        ("new", BASE | {"layer_types": ["full_attention", "retention"] * 2}, "retention"),
        ("new", BASE | {"layer_types": ["full_attention"]}, "lists 1 layers"),
        ("new", BASE | {"layer_types": ["linear_attention"] * 4}, "isn't known"),
        ("new", BASE | MLA | {"layer_types": ["sliding_attention"] * 4}, "MLA with"),
        ("new", {k: v for k, v in BASE.items() if k != "hidden_size"}, "hidden_size or n_embd"),
        ("new", BASE | {"num_key_value_heads": "two"}, "an integer"),
        ("new", BASE | {"layer_types": ["indexed_attention"] * 4}, "without MLA"),
        ("new", BASE | {"layer_types": ["hybrid"] * 4}, "state isn't told"),
        ("t5", BASE | {"is_encoder_decoder": True}, "decoder alone"),
        ("new", BASE | {"num_kv_shared_layers": 2}, "layers share"),
        ("foveate", BASE | {"mixer": "grassmann"}, "mixer"),
        ("foveate", BASE | {"attention": "dma"}, "expected full"),
        ("foveate", BASE | {"router": "similarity-smoe", "moe_layers": [1]}, "router"),
    ],
)  # fmt: skip
def test_refusals_by_name(kind, values, says, tmp_path):
    with pytest.raises(InputError, match=says):
        read(folder_of(tmp_path, kind, values))


def test_folders_that_are_none(tmp_path):
    with pytest.raises(InputError, match="can't be read"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="no JSON"):
        read(tmp_path)


def test_older_ways_of_saying_which_layer_is_what():
    def kinds(**more):
        return layer_kinds(Given({"model_type": "new"} | BASE | more))

    assert kinds(attn_type_list=[0, 0, 1, 0])[2] == "full_attention"
    assert kinds(attn_layer_period=4, attn_layer_offset=1)[:2] == ["mamba", "full_attention"]
    assert set(kinds(sliding_window=8)) == {"sliding_attention"}
    assert set(kinds(sliding_window=8, use_sliding_window=False)) == {"full_attention"}
    mixed = kinds(sliding_window=8, use_sliding_window=True, max_window_layers=3)
    assert mixed == ["full_attention"] * 3 + ["sliding_attention"]
