"""The layers of a model as its config composes them."""

from __future__ import annotations

from copy import copy

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from foveate.methods import make
from foveate.models.config import FoveateConfig
from foveate.models.recompute import RecomputedBlock
from foveate.nn import GELU, Attention, Block, MixerLayer, MoE, Router, SwiGLU
from foveate.ops.errors import InputError, nearest
from foveate.parts.mixer import Mixer
from foveate.parts.projection import Projection
from foveate.parts.rope import Rope
from foveate.parts.routing import RouterParts, RouterRecipe, RouterSizes

FEEDFORWARDS: dict[str, type[SwiGLU] | type[GELU]] = {"swiglu": SwiGLU, "gelu": GELU}


def block_of(
    config: FoveateConfig, layer: int, ropes: dict[tuple[int, bool], Rope | None]
) -> Block:
    """One layer of a model; `ropes` are shared by its layers, so that their tables are too."""
    mixer = config.mixer_of(layer)
    mixing: Attention | MixerLayer
    if mixer is not None:
        mixing = MixerLayer(
            config.hidden_size,
            config.num_attention_heads,
            mixer,
            "none",
            head_dim=config.head_dim,
            layer=layer,
            layers=config.num_hidden_layers,
        )
        mixing.mixer.rope = _shared_rope(config, mixing.mixer, ropes)
    else:
        mixing = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.of_layer("projection", layer),
            config.of_layer("attention", layer),
            "none",
            head_dim=config.head_dim,
            bias=config.attention_bias,
            out_bias=config.attention_out_bias,
            dropout=config.attention_dropout,
            sink_logits=config.sink_logits,
            kv_bias=config.kv_bias,
            gate=config.gate,
            layer=layer,
        )
        if mixing.attention.rotary:
            mixing.rope = _shared_rope(config, mixing.projection, ropes)
    feedforward: SwiGLU | GELU | MoE
    if layer in (config.moe_layers or ()):
        parts = router_of(config, layer, mixing)
        router = Router(
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            config.router_score,  # type: ignore[arg-type]
            renormalize=config.router_renormalize,
            scaling=config.router_scaling,
            groups=config.router_groups,
            top_groups=config.router_top_groups,
            scores=parts.scores,
            relation=parts.relation,
        )
        feedforward = MoE(
            router,
            config.moe_intermediate_size,
            shared=config.shared_expert_intermediate_size,
            balance=config.router_balance,
            per_slot=config.router_balance_per_slot,
        )
    else:
        assert config.intermediate_size is not None
        if config.feedforward not in FEEDFORWARDS:
            raise InputError(
                f"FoveateConfig(feedforward={config.feedforward!r}) is unknown; "
                f"{nearest(str(config.feedforward), FEEDFORWARDS)}"
            )
        dense = FEEDFORWARDS[config.feedforward]
        feedforward = dense(config.hidden_size, config.intermediate_size)
    return RecomputedBlock(
        mixing, feedforward, config.rms_norm_eps, config.norm, config.hidden_dropout
    )


def router_of(config: FoveateConfig, layer: int, mixing: Attention | MixerLayer) -> RouterParts:
    """What the router of a layer is made of, behind the attention or mixer of its block.

    Raises:
        InputError: the text names no router, or one that doesn't fit the layer.
    """
    text = config.of_layer("router", layer)
    recipe = make(text)
    if not isinstance(recipe, RouterRecipe):
        raise InputError(
            f'FoveateConfig(router={text!r}): that is no router; expected one such as "top-k" or '
            '"similarity-smoe" (see foveate methods).'
        )
    heads = mixing.projection.heads if isinstance(mixing, Attention) else 0
    sizes = RouterSizes(config.hidden_size, config.num_experts, heads, config.vocab_size)
    return recipe.build(sizes)


def _shared_rope(
    config: FoveateConfig,
    turning: Projection | Mixer,
    ropes: dict[tuple[int, bool], Rope | None],
) -> Rope | None:
    """One `Rope` for all layers that turn alike, so that they share its tables."""
    kind = (turning.rope_dim, turning.interleaved)
    if kind not in ropes:
        ropes[kind] = _rope(config, turning)
    return ropes[kind]


def _rope(config: FoveateConfig, projection: Projection | Mixer) -> Rope | None:
    """Rotary positions as the config asks, for the dimensions that turn in this projection."""
    dim = projection.rope_dim
    if config.position != "rope" or not dim:
        return None
    given = config.rope_parameters or {}
    pairs = config.rope_interleaved
    interleaved = projection.interleaved if pairs is None else pairs
    kind = given.get("rope_type", "default")
    if kind == "default":
        return Rope.of(dim, given.get("rope_theta", 10_000.0), interleaved=interleaved)
    if kind not in ROPE_INIT_FUNCTIONS or kind in ("dynamic", "longrope"):
        raise InputError(
            f"FoveateConfig(rope_parameters): rope_type {kind!r} isn't supported here; expected "
            "default, linear, yarn or llama3 (types that change with the length have no fixed "
            "cache)."
        )
    turning = copy(config)
    turning.head_dim = dim
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](turning, device=torch.device("cpu"))
    return Rope(inv_freq.double(), interleaved, scaling)
