"""Released weights' layouts: Llama's, DeepSeek-V3's and Step-3's names and shapes onto foveate's.

A layout says how its config becomes a `FoveateConfig`, and for each of its tensors where that goes.
Both files as published (one tensor per expert in DeepSeek's) and the fused experts of transformers'
own DeepSeek-V3 class are read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.models.causal_lm import FoveateForCausalLM
from foveate.models.config import FoveateConfig
from foveate.ops.errors import InputError, nearest

Given = dict[str, Any]


class Layout(NamedTuple):
    """A family's config and names.

    config: from its config.json; names: (pattern of its names, ours) in order of trial, where ours
    may end in "[i]" (expert i of a stacked tensor) or "[gate,up]" (two of ours, one behind the
    other); skipped: names of parts that aren't the language model.
    """

    config: Callable[[Given], FoveateConfig]
    names: tuple[tuple[str, str], ...]
    skipped: str


_LAYER = r"model\.layers\.(\d+)\."
_COMMON = (
    (r"model\.embed_tokens\.weight", "model.embed_tokens.weight"),
    (r"model\.norm\.weight", "model.norm.weight"),
    (r"lm_head\.weight", "lm_head.weight"),
    (_LAYER + r"input_layernorm\.weight", r"model.layers.\1.attention_norm.weight"),
    (_LAYER + r"post_attention_layernorm\.weight", r"model.layers.\1.feedforward_norm.weight"),
    (_LAYER + r"mlp\.(gate|up|down)_proj\.weight", r"model.layers.\1.feedforward.\2.weight"),
)
_P = r"model.layers.\1.attention.projection."
_F = r"model.layers.\1.feedforward."
_DEEPSEEK = (
    *_COMMON,
    (_LAYER + r"self_attn\.(?:q_proj|q_b_proj)\.weight", _P + "q_up.weight"),
    (_LAYER + r"self_attn\.q_a_proj\.(weight|bias)", _P + r"q_down.\2"),
    (_LAYER + r"self_attn\.q_a_layernorm\.weight", _P + "q_norm.weight"),
    (_LAYER + r"self_attn\.kv_a_proj_with_mqa\.(weight|bias)", _P + r"kv_down.\2"),
    (_LAYER + r"self_attn\.kv_a_layernorm\.weight", _P + "kv_norm.weight"),
    (_LAYER + r"self_attn\.kv_b_proj\.weight", _P + "kv_up.weight"),
    (_LAYER + r"self_attn\.o_proj\.(weight|bias)", _P + r"out.\2"),
    (_LAYER + r"mlp\.gate\.weight", _F + "router.weight"),
    (_LAYER + r"mlp\.gate\.e_score_correction_bias", _F + "router.bias"),
    (_LAYER + r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight", _F + r"\3[\2]"),
    (_LAYER + r"mlp\.experts\.gate_up_proj", _F + "[gate,up]"),
    (_LAYER + r"mlp\.experts\.down_proj", _F + "down"),
    (
        _LAYER + r"mlp\.shared_experts\.(gate|up|down)_proj\.weight",
        _F + r"shared.\2.weight",
    ),
)
_STEP3 = (
    *_COMMON,
    (_LAYER + r"self_attn\.q_proj\.weight", _P + "q_down.weight"),
    (_LAYER + r"self_attn\.inter_norm\.weight", _P + "q_norm.weight"),
    (_LAYER + r"self_attn\.wq\.weight", _P + "q_up.weight"),
    (_LAYER + r"self_attn\.(k|v)_proj\.weight", _P + r"\2.weight"),
    (_LAYER + r"self_attn\.o_proj\.weight", _P + "out.weight"),
    (_LAYER + r"moe\.gate\.weight", _F + "router.weight"),
    (_LAYER + r"moe\.(gate|up|down)_proj\.weight", _F + r"\2"),
    (_LAYER + r"share_expert\.(gate|up|down)_proj\.weight", _F + r"shared.\2.weight"),
)

_LLAMA = (
    *_COMMON,
    (_LAYER + r"self_attn\.(q|k|v)_proj\.(weight|bias)", _P + r"\2.\3"),
    (_LAYER + r"self_attn\.o_proj\.(weight|bias)", _P + r"out.\2"),
)


def _llama(given: Given) -> FoveateConfig:
    if given.get("hidden_act", "silu") != "silu" or given.get("mlp_bias"):
        raise InputError(
            f"hidden_act={given.get('hidden_act')!r}, mlp_bias={given.get('mlp_bias')!r}: expected "
            "Llama's own feed-forward, silu without biases."
        )
    heads = given["num_attention_heads"]
    return FoveateConfig(
        **_shared(given),
        projection=f"gqa(kv_heads={given.get('num_key_value_heads') or heads})",
        head_dim=given.get("head_dim") or given["hidden_size"] // heads,
        rope_parameters=_rope(given),
        attention_bias=given.get("attention_bias", False),
        attention_out_bias=given.get("attention_bias", False),
    )


def _deepseek(given: Given) -> FoveateConfig:
    layers = given["num_hidden_layers"]
    dense = given.get("first_k_dense_replace", 0)
    experts = given.get("n_routed_experts") or given.get("num_local_experts") or 0
    rope = _rope(given)
    factor, all_dim = rope.get("factor", 1.0), rope.get("mscale_all_dim", 0)
    mscale = 0.1 * all_dim * math.log(factor) + 1.0 if all_dim and factor > 1 else 1.0
    projection = (
        f"mla(latent={given['kv_lora_rank']}, rope_dim={given['qk_rope_head_dim']}, "
        f"query_rank={given.get('q_lora_rank')}, head_dim={given['qk_nope_head_dim']}, "
        f"value_dim={given['v_head_dim']}, mscale={mscale!r})"
    )
    moe = list(range(dense, layers)) if experts else None
    width = given.get("moe_intermediate_size", 0)
    return FoveateConfig(
        **_shared(given),
        projection=projection,
        rope_parameters=rope,
        rope_interleaved=bool(given.get("rope_interleave", True)),
        attention_bias=given.get("attention_bias", False),
        attention_out_bias=given.get("attention_bias", False),
        moe_layers=moe,
        num_experts=experts,
        num_experts_per_tok=given.get("num_experts_per_tok", 1),
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width * (given.get("n_shared_experts") or 0),
        router_score=given.get("scoring_func", "sigmoid"),
        router_renormalize=given.get("norm_topk_prob", True),
        router_scaling=given.get("routed_scaling_factor", 1.0),
        router_groups=given.get("n_group") or 1,
        router_top_groups=given.get("topk_group") or 1,
    )


def _step3(given: Given) -> FoveateConfig:
    given = given.get("text_config", given)
    layers = given["num_hidden_layers"]
    listed = given.get("moe_layers_enum")
    if listed is None:
        moe = list(range(1, layers))
    else:
        moe = [int(i) for i in listed.split(",")] if isinstance(listed, str) else list(listed)
    width = given["head_dim"]
    rank = given.get("share_q_dim") or width
    rope = _rope(given)
    return FoveateConfig(
        **(_shared(given) | {"rms_norm_eps": given.get("rms_norm_eps", 1e-5)}),
        projection=f"mfa(head_dim={width}, query_rank={rank}, "
        f"eps={given.get('rms_norm_eps', 1e-5)!r})",
        rope_parameters=rope,
        moe_layers=moe,
        num_experts=given["moe_num_experts"],
        num_experts_per_tok=given["moe_top_k"],
        moe_intermediate_size=given["moe_intermediate_size"],
        shared_expert_intermediate_size=given["share_expert_dim"],
        router_renormalize=given.get("norm_expert_weight", False),
    )


def _shared(given: Given) -> Given:
    """Fields that have the same meaning everywhere."""
    longest = given.get("max_position_embeddings") or given.get("max_position_embedding") or 4096
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size",
    )  # fmt: skip
    rest = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    return (
        {name: given[name] for name in names}
        | {name: given[name] for name in rest if given.get(name) is not None}
        | {
            "rms_norm_eps": given.get("rms_norm_eps", 1e-6),
            "max_position_embeddings": longest,
        }
    )


def _rope(given: Given) -> Given:
    """Transformers' rope_parameters, from those or from the older two fields."""
    scaling = given.get("rope_scaling") or {}
    rope = dict(given.get("rope_parameters") or {"rope_type": "default"} | scaling)
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    rope.setdefault("rope_theta", given.get("rope_theta") or 10_000.0)
    return rope


LAYOUTS = {
    "llama": Layout(_llama, _LLAMA, r"$^"),
    "deepseek_v3": Layout(_deepseek, _DEEPSEEK, r"$^"),
    "step3_text": Layout(_step3, _STEP3, r"vision_model\.|vit_"),
    "step3_vl": Layout(_step3, _STEP3, r"vision_model\.|vit_"),
}


def config_from(given: Any) -> FoveateConfig:
    """A FoveateConfig for a family's config (transformers' object, or the config.json as a dict).

    Raises:
        InputError: the family isn't known, or the config lacks one of its sizes.
    """
    plain = given if isinstance(given, dict) else given.to_dict()
    layout = _layout(plain)
    try:
        return layout.config(plain)
    except KeyError as missing:
        raise InputError(
            f"model_type={plain['model_type']!r}: the config lacks {missing}; give the whole one."
        ) from missing


def _layout(given: Given) -> Layout:
    kind = given.get("model_type", "")
    if kind not in LAYOUTS:
        raise InputError(
            f"model_type={kind!r}: its weights' layout isn't known; {nearest(str(kind), LAYOUTS)}"
        )
    return LAYOUTS[kind]


def weights_from(
    model: FoveateForCausalLM, family: str, tensors: Iterable[tuple[str, Tensor]]
) -> FoveateForCausalLM:
    """Copy a family's tensors into a model of its `config_from`, one by one.

    Args:
        model: of the right config; filled in place, in its own dtype.
        family: "llama", "deepseek_v3", "step3_text" or "step3_vl".
        tensors: the names and tensors, whole or sharded, in any order.

    Raises:
        InputError: a name or shape that doesn't fit, or weights of ours that nothing filled.
    """
    layout = _layout({"model_type": family})
    ours = model.state_dict()  # the very tensors of the model
    missing = dict.fromkeys(ours, 1)
    for expert in [name for name in ours if re.search(r"feedforward\.(gate|up|down)$", name)]:
        missing[expert] = len(ours[expert])
    if not any(to.endswith("router.bias") for _, to in layout.names):
        for name in [name for name in ours if name.endswith("router.bias")]:
            ours[name].zero_()  # this family has none
            del missing[name]
    last = model.config.num_hidden_layers
    for name, tensor in tensors:
        layer = re.match(_LAYER, name)
        if re.match(layout.skipped, name) or (layer and int(layer[1]) >= last):
            continue  # an image tower, or layers that predict further tokens
        for key, index, part in _places(layout, name, tensor):
            if key not in ours:
                raise InputError(f"{name} would go to {key}, which this model doesn't have.")
            slot = ours[key] if index is None else ours[key][index]
            if slot.shape != part.shape:
                raise InputError(
                    f"{name} is {tuple(part.shape)}, but {key} takes {tuple(slot.shape)}; was the "
                    "model made from another config?"
                )
            slot.copy_(part)
            missing[key] -= missing[key] if index is None else 1
    if model.config.tie_word_embeddings:
        missing["lm_head.weight"] = 0
    left = [name for name, count in missing.items() if count > 0]
    if left:
        raise InputError(f"{len(left)} weights weren't among the tensors, such as {left[0]}.")
    return model


def _places(layout: Layout, name: str, tensor: Tensor) -> Iterator[tuple[str, int | None, Tensor]]:
    """Where a tensor goes: (our name, expert or None for all, tensor)."""
    for pattern, ours in layout.names:
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        key = match.expand(ours)
        stacked = re.fullmatch(r"(.*)\[(\d+)\]", key)
        if stacked:
            yield stacked[1], int(stacked[2]), tensor
        elif key.endswith("[gate,up]"):
            for part, half in zip(("gate", "up"), tensor.chunk(2, 1)):
                yield key.removesuffix("[gate,up]") + part, None, half
        else:
            yield key, None, tensor
        return
    raise InputError(f"The tensor {name} has no place in this layout.")


def load_layout(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> FoveateForCausalLM:
    """A model with the weights of a Llama, DeepSeek-V3 or Step-3 folder, as published.

    Args:
        folder: with config.json and safetensors files.
        dtype: of the model.
        device: where it goes.

    Raises:
        InputError: no such files, quantised weights, or what `weights_from` refuses.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json.")
    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if given.get("quantization_config"):
        raise InputError(
            f"{folder}: the weights are quantised; convert them to {dtype} first, with the "
            "script that comes with them."
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no safetensors files.")
    made = FoveateForCausalLM(config_from(given)).to(device, dtype)
    return weights_from(made, given["model_type"], _tensors(files)).eval()


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, "pt") as held:
            for name in held.keys():  # noqa: SIM118 - it is no mapping
                yield name, held.get_tensor(name)
