"""Costs of a model from its config.json: every layer's attention or state, and its feed-forward.

`foveate cost ... --model FOLDER` reads multi-head, grouped and multi-query attention, MLA, with an
indexer or without, MFA, windows and chunks by layer, and layers with states (gated delta nets,
Kimi's delta attention, lightning attention, Mamba 1 and 2, short convolutions), dense and with
experts. What it doesn't know it refuses by name, so that no model is priced as something else.
"""

from __future__ import annotations

import re
from pathlib import Path

from foveate.cost.fields import Given, given
from foveate.cost.layer import FeedForward, Layer, Model
from foveate.cost.mixers import mixing_of
from foveate.ops.errors import InputError

_NOT_COUNTED = re.compile(
    r"((mlp|moe|mixer|feed_forward|ffn)\.gate\.weight|router|shared_expert_gate|bias|norm"
    r"|wpe|embed_positions|A_log|sinks)"
)

# Blocks whose parts the fields that they share with others don't tell.
UNREADABLE = {
    "longcat_flash": "two attentions in each block, and experts that do nothing",
    "gemma3n": "four streams, and caches that layers share",
    "gemma3n_text": "four streams, and caches that layers share",
    "zamba": "blocks that share one attention",
    "zamba2": "blocks that share one attention",
    "mllama": "layers that attend to an image",
    "diffllama": "two softmaxes in each head",
    "recurrent_gemma": "recurrences of their own kind",
    "jetmoe": "experts in attention",
    "hrm_text": "blocks that run several times",
    "zaya": "attention of their own kind",
    "rwkv": "token mixing of its own kind",
    "xlstm": "token mixing of its own kind",
}

STATES_ALONE = ("mamba", "mamba2", "falcon_mamba")  # nothing but states

# Families with two matrices and an activation between them in place of a gated feed-forward.
PLAIN = (
    "apertus", "arcee", "bert", "biogpt", "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode",
    "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gptj", "jais2", "mpt", "nanochat", "nemotron",
    "nemotron_h", "openai-gpt", "opt", "persimmon", "phi", "roberta", "starcoder2", "xglm",
)  # fmt: skip


def read(folder: str | Path) -> Model:
    """The model of a folder.

    Args:
        folder: with a config.json, or that file.

    Raises:
        InputError: it can't be read, or describes what isn't known here.
    """
    return model_of(given(folder))


def matrices_of_class(folder: str | Path) -> int | None:
    """Numbers in all matrices of the model that transformers' own class makes of a config.

    The model is built without memory (on torch's meta device). Routers, positions, convolutions'
    biases and norms aren't counted, as in `Model.parameters`.

    Args:
        folder: as for `read`.

    Returns:
        None where transformers isn't there, doesn't know the type, or can't build it.
    """
    try:
        import torch
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    except ImportError:
        return None
    config = given(folder)
    if config.kind not in CONFIG_MAPPING:
        return None
    try:
        made = CONFIG_MAPPING[config.kind].from_dict(dict(config.plain))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made, trust_remote_code=False)
    except Exception:  # whatever a class raises on a config that it can't take
        return None
    return sum(
        p.numel() for name, p in model.named_parameters()
        if p.dim() >= 2 and not _NOT_COUNTED.search(name)
    )  # fmt: skip


def model_of(config: Given) -> Model:
    """The model of a config.

    Raises:
        InputError: it describes what isn't known here.
    """
    if config.kind in UNREADABLE:
        raise InputError(
            f"{config.name}: models of type {config.kind} have {UNREADABLE[config.kind]}, which "
            "foveate cost doesn't know."
        )
    if config.kind == "foveate":
        from foveate.cost.own import own_model

        return own_model(config)
    if config.get("num_kv_shared_layers"):
        raise InputError(f"{config.name}: caches that layers share are not known.")
    kinds = layer_kinds(config)
    layers = []
    for i, kind in enumerate(kinds):
        if kind in ("mlp", "moe"):  # Nemotron-H: every block is one thing
            layers.append(Layer((), feedforward_of(config, i, experts=kind == "moe")))
            continue
        alone = "mlp" in kinds or "moe" in kinds or config.kind in STATES_ALONE
        layers.append(Layer(mixing_of(config, kind, i),
                            None if alone else feedforward_of(config, i)))  # fmt: skip
    return Model(
        config.name,
        config.number("hidden_size"),
        tuple(layers),
        config.number("vocab_size"),
        bool(config.get("tie_word_embeddings", False)),
    )


def layer_kinds(config: Given) -> list[str]:
    """What each layer is, in transformers' words such as "sliding_attention"."""
    count = len(config.get("layers_block_type") or ()) or config.number("num_hidden_layers")
    for name in ("layer_types", "layers_block_type"):
        listed = config.get(name)
        if listed:
            if len(listed) != count:
                raise InputError(
                    f"{config.name}: {name} lists {len(listed)} layers, there are {count}."
                )
            return [str(kind) for kind in listed]
    listed = config.get("attn_type_list")  # MiniMax-01: 1 attends
    if listed:
        return ["full_attention" if kind else "linear_attention" for kind in listed]
    if config.kind in STATES_ALONE:
        return ["mamba"] * count
    if config.kind == "falcon_h1":
        return ["hybrid"] * count
    if (period := config.get("attn_layer_period")) is not None:  # Jamba
        offset = config.number("attn_layer_offset", 0)
        return ["full_attention" if i % period == offset else "mamba" for i in range(count)]
    if (at := config.get("attn_layer_indices")) is not None or config.kind == "bamba":
        return ["full_attention" if i in (at or ()) else "mamba" for i in range(count)]
    if config.get("index_topk") and config.get("kv_lora_rank"):  # DeepSeek-V3.2
        return ["indexed_attention"] * count
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True):
        first = config.get("max_window_layers", 0) if config.get("use_sliding_window") else 0
        return ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    return ["full_attention"] * count


def feedforward_of(config: Given, layer: int, experts: bool | None = None) -> FeedForward:
    """The feed-forward of a layer; `experts` says whether it has some, None asks the config."""
    count = config.number("experts", 0)
    count = count if count > 1 and config.get("is_moe", True) else 0
    matrices = 2 if config.kind in PLAIN else 3
    width = _dense_width(config, layer)
    shared = config.get("shared_width")
    if not count or not (_sparse(config, layer) if experts is None else experts):
        if config.kind == "granitemoehybrid" and shared:  # its dense form is the shared expert
            width = int(shared)
        elif config.get("intermediate_size_mlp"):  # Llama 4
            width = config.number("intermediate_size_mlp")
        return FeedForward(width, matrices=matrices)
    each = config.number("expert_width", config.get("intermediate_size"), layer)
    number = config.get("shared_count") or 0
    if config.kind in ("llama4_text", "llama4"):
        always = each
    elif config.kind == "nemotron_h":
        always = config.number("moe_shared_expert_intermediate_size", 0) * int(number)
    else:
        always = int(shared) if shared else each * int(number)
    return FeedForward(always, each, count, config.number("top_k"), matrices)


def _dense_width(config: Given, layer: int) -> int:
    dim = config.number("hidden_size")
    if config.get("intermediate_size") is None:
        return 4 * dim
    width = config.number("intermediate_size", None, layer)
    if config.kind == "lfm2" and config.get("block_auto_adjust_ff_dim"):
        width = int(2 * width / 3 * config.get("block_ffn_dim_multiplier", 1.0))
        step = config.number("block_multiple_of", 256)
        width = -(-width // step) * step
    return width


def _sparse(config: Given, layer: int) -> bool:
    """Whether a layer has experts, in a model that has some."""
    if (kinds := config.get("mlp_layer_types")) is not None:
        return kinds[layer] != "dense"
    for name in ("moe_layers", "moe_layers_enum"):
        listed = config.get(name)
        if listed is not None:
            chosen = [x for x in listed.split(",") if x] if isinstance(listed, str) else listed
            return layer in {int(x) for x in chosen}
    if config.kind in ("step3_text", "step3_vl"):
        return layer >= 1
    for name in ("first_k_dense_replace", "num_dense_layers"):
        first = config.get(name)
        if first is not None and layer < first:
            return False
    if layer in (config.get("mlp_only_layers") or ()):
        return False
    if (step := config.get("decoder_sparse_step")) is not None:
        return bool(step) and (layer + 1) % step == 0
    if (begin := config.get("moe_layer_start_index")) is not None:  # ERNIE 4.5
        end = config.get("moe_layer_end_index", -1)
        inside = begin <= layer and (layer <= end or end < 0)
        return inside and (layer + 1) % config.get("moe_layer_interval", 1) == 0
    if (period := config.get("expert_layer_period")) is not None:  # Jamba
        return layer % period == config.get("expert_layer_offset", 0)
    return layer % (config.get("moe_layer_freq") or 1) == 0
