"""What mixes the tokens of one layer, from a config: attention of all kinds, and states.

Of a layer with a state its operations are counted by number of the state: of a delta rule
(S <- a S + k (v - S k) b, read by q) 7, of Mamba (h <- a h + (d B) x, read by C) 5, of lightning
attention 10 as the report's figures come to. States are fp32; a short convolution's few inputs
stand beside them in 16 bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from foveate.cost.fields import Given
from foveate.cost.layer import Mixing, grouped, indexer, linear, mfa, mla
from foveate.ops.errors import InputError

Parts = tuple[Mixing, ...]


def mixing_of(config: Given, kind: str, layer: int) -> Parts:
    """The parts of a layer of this kind, in transformers' words.

    Raises:
        InputError: the kind isn't known.
    """
    if kind in ("full_attention", "attention", "global_attention"):
        return (attention(config, layer),)
    if kind in ("sliding_attention", "chunked_attention", "local_attention"):
        return (attention(config, layer, kind),)
    if kind == "indexed_attention":
        return _indexed(config, layer)
    if kind == "hybrid":  # Falcon-H1, Hymba: side by side
        return (attention(config, layer), *_mamba(config))
    if kind in ("mamba", "mamba2", "linear_attention", "conv", "recurrent"):
        return _state_of(config, kind)(config)
    raise InputError(
        f"{config.name}: layer {layer} is of kind {kind!r}; known are full_attention, "
        "sliding_attention, chunked_attention, indexed_attention, linear_attention, mamba, hybrid, "
        "conv."
    )


def attention(config: Given, layer: int, kind: str = "full_attention") -> Mixing:
    """The attention of a layer, with its window if it has one."""
    dim, heads = config.number("hidden_size"), config.number("num_attention_heads", None, layer)
    if config.get("kv_lora_rank"):
        if kind != "full_attention":
            raise InputError(f"{config.name}: MLA with {kind} is not known.")
        rank = config.get("q_lora_rank")
        return mla(
            dim, heads, None if not rank else int(rank), config.number("kv_lora_rank"),
            config.number("qk_rope_head_dim"), config.number("qk_nope_head_dim"),
            config.number("v_head_dim"),
        )  # fmt: skip
    width = config.number("head_dim", dim // heads, layer)
    if config.get("share_q_dim") and config.kind in ("step3_text", "step3_vl"):
        return mfa(dim, heads, width, config.number("share_q_dim"))
    window = None
    if kind != "full_attention":
        name = "attention_chunk_size" if kind == "chunked_attention" else "sliding_window"
        window = config.number(name, config.get("sliding_window"), layer)
    kv = config.number("num_key_value_heads", heads, layer)
    if config.kind in ("falcon", "gpt_bigcode") and config.get("multi_query"):
        kv = kv if config.get("new_decoder_architecture") else 1
    if config.kind == "mimo_v2_flash" and window is not None:
        kv *= 2
    return grouped(
        dim, heads, kv, width, value=config.get("v_head_dim"), window=window,
        chunked=kind == "chunked_attention",
        gate=config.kind.startswith(("qwen3_next", "qwen3_5")),
    )  # fmt: skip


def _indexed(config: Given, layer: int) -> Parts:
    """DeepSeek-V3.2: an indexer reads its own key of every token, MLA the best of them."""
    shared = set(config.get("indexer_types") or ()) - {"full"}
    if not config.get("kv_lora_rank") or not config.get("q_lora_rank") or shared:
        raise InputError(
            f"{config.name}: indexed_attention without MLA and a query latent, or with an index "
            "that layers share, is not known."
        )
    return (
        replace(attention(config, layer), reads=config.number("index_topk")),
        indexer(
            config.number("hidden_size"), config.number("index_n_heads"),
            config.number("index_head_dim"), config.number("q_lora_rank"),
        ),
    )  # fmt: skip


def _state_of(config: Given, kind: str) -> Callable[[Given], Parts]:
    if kind == "conv" and config.get("conv_L_cache"):
        return _short_convolution
    if kind != "recurrent":
        if config.get("linear_num_value_heads"):
            return _gated_delta
        if config.get("linear_head_dim") or config.get("linear_attn_config"):
            return _kimi_delta
        if config.kind.startswith("minimax") or config.get("attn_type_list"):
            return _lightning
        if any(config.get(n) for n in ("mamba_d_state", "state_size", "ssm_state_size")):
            return _mamba
    raise InputError(
        f"{config.name}: its layers of kind {kind!r} keep states of a form that isn't known "
        f"(model type {config.kind or 'unknown'})."
    )


def _convolution(channels: int, kernel: int) -> Mixing:
    """A causal convolution by channel: its last inputs are kept."""
    return linear(channels * kernel, channels * kernel, 1, each=2, flops=0)


def _gated_delta(config: Given) -> Parts:
    """Gated delta net (Qwen3-Next): heads of keys serve several of values; b and a for each."""
    dim = config.number("hidden_size")
    keys, values = config.number("linear_num_key_heads"), config.number("linear_num_value_heads")
    dk, dv = config.number("linear_key_head_dim"), config.number("linear_value_head_dim")
    key, value = keys * dk, values * dv
    weights = dim * (2 * key + 2 * value + 2 * values) + value * dim
    state = values * dk * dv
    return (
        linear(weights, state, values, flops=7 * state, width=2 * key + 2 * value),
        _convolution(2 * key + value, config.number("linear_conv_kernel_dim", 4)),
    )


def _kimi_delta(config: Given) -> Parts:
    """Kimi's delta attention: q, k, v of h heads, decay and output gate of low rank d."""
    dim = config.number("hidden_size")
    nested = config.get("linear_attn_config") or {}
    heads = nested.get("num_heads") or config.number("linear_num_heads")
    d = nested.get("head_dim") or config.number("linear_head_dim")
    kernel = nested.get("short_conv_kernel_size") or config.number("linear_conv_kernel_dim", 4)
    inner = heads * d
    weights = 4 * dim * inner + 2 * (dim * d + d * inner) + dim * heads
    state = heads * d * d
    return (
        linear(weights, state, heads, flops=7 * state, width=4 * inner),
        _convolution(3 * inner, kernel),
    )


def _lightning(config: Given) -> Parts:
    """Lightning attention (MiniMax): q, k, v, an output gate, and the map back."""
    dim, heads = config.number("hidden_size"), config.number("num_attention_heads")
    d = config.number("head_dim", dim // heads)
    return (linear(5 * dim * heads * d, heads * d * d, heads, width=4 * heads * d),)


def _mamba(config: Given) -> Parts:
    """Mamba 2, whose heads share a decay, or Mamba 1, where every channel has its own."""
    dim = config.number("hidden_size")
    n = _first(config, "mamba_d_state", "ssm_state_size", "state_size")
    if n is None:
        raise InputError(f"{config.name}: the size of its Mamba layers' state isn't told.")
    kernel = int(config.get("mamba_d_conv") or config.get("conv_kernel") or 4)
    heads = _first(config, "mamba_n_heads", "mamba_num_heads")
    if config.kind == "mamba2":
        heads = config.number("num_heads")
    if heads:
        d = _first(config, "mamba_d_head", "mamba_head_dim") or config.number("head_dim")
        groups = _first(config, "mamba_n_groups", "n_groups") or 1
        inner = heads * d
        passed = inner + 2 * groups * n
        weights = dim * (inner + passed + heads) + inner * dim
        state = inner * n
        return (linear(weights, state, heads, flops=5 * state, width=inner + passed),
                _convolution(passed, kernel))  # fmt: skip
    inner = dim * (_first(config, "mamba_expand", "expand") or 2)
    if config.get("intermediate_size") and config.kind in ("mamba", "falcon_mamba"):
        inner = config.number("intermediate_size")
    rank = _first(config, "mamba_dt_rank", "time_step_rank") or -(-dim // 16)
    weights = 2 * dim * inner + inner * (rank + 2 * n) + rank * inner + inner * dim
    state = inner * n
    return (linear(weights, state, inner, flops=5 * state, width=2 * inner),
            _convolution(inner, kernel))  # fmt: skip


def _short_convolution(config: Given) -> Parts:
    """LFM2: x -> B, C, x; a convolution between two gates."""
    dim = config.number("hidden_size")
    return (linear(4 * dim * dim, 0, 1, flops=0, width=3 * dim),
            _convolution(dim, config.number("conv_L_cache")))  # fmt: skip


def _first(config: Given, *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
