"""The configurations of foveate's language models, in transformers' form."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from foveate import catalog
from foveate.models.auto import register_models
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole

POOLINGS = ("mean", "max", "cls", "ends")


class FoveateConfig(PreTrainedConfig):
    """Sizes and composition of a causal language model.

    `projection` and `attention` are texts as `foveate.Attention` takes them, or one for each layer:

        FoveateConfig(vocab_size=256, hidden_size=128, num_hidden_layers=3, num_attention_heads=8,
                      projection="mfa(head_dim=16)", attention="full")

    A layer that has a `mixer` (such as "grassmann") has no attention; a hybrid is a list with None
    where attention stays:

        FoveateConfig(num_hidden_layers=4, mixer=["deconstructed-mlp", None] * 2)

    Layers in `moe_layers` have experts in place of the dense feed-forward (see `foveate.nn.MoE`).

    Attributes:
        head_dim: None is hidden_size / num_attention_heads, or what the projection says.
        intermediate_size: of the dense feed-forward; None is 8/3 of hidden_size, rounded up to 8.
        mixer: as `foveate.nn.MixerLayer` takes it, for all layers or by layer; None is attention.
        feedforward: "swiglu", or "gelu" with biases.
        norm: "rms" or "layer".
        hidden_dropout: of each feed-forward layer's output in training.
        position: "rope", "none", or "learned": embeddings of max_position_embeddings positions.
        rope_parameters: as everywhere in transformers; rope_theta, rope_type, scaling.
        rope_interleaved: whether rotary pairs are neighbours; None is the projection's habit.
        sink_logits, kv_bias, gate: of every attention, as `foveate.Attention` takes them.
        registers: learned tokens in front of every sequence; see `foveate.models.registers`.
        moe_layers: indices of layers with experts; None is no layer.
        num_experts, num_experts_per_tok, moe_intermediate_size, shared_expert_intermediate_size,
            router_score, router_renormalize, router_scaling, router_groups, router_top_groups,
            router_balance: as in `foveate.nn.MoE` and `Router`.
        router: a router of the catalog for layers with experts, such as "similarity-smoe", or one
            for each layer.
        router_balance_per_slot: as `per_slot` in `foveate.nn.MoE`.

    Raises:
        InputError: as many texts as layers were expected, or an expert's size is missing.
    """

    model_type = "foveate"
    keys_to_ignore_at_inference = ["past_key_values", "aux"]

    vocab_size: int = 256
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    head_dim: int | None = None
    intermediate_size: int | None = None
    projection: str | list[str] = "mha"
    attention: str | list[str] = "full"
    mixer: str | list[str | None] | None = None
    feedforward: str = "swiglu"
    norm: str = "rms"
    hidden_dropout: float = 0.0
    position: str = "rope"
    rope_parameters: dict[str, Any] | None = None
    rope_interleaved: bool | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_out_bias: bool = False
    attention_dropout: float = 0.0
    sink_logits: str | None = None
    kv_bias: str | None = None
    gate: str | None = None
    registers: int = 0
    moe_layers: list[int] | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    router_score: str = "softmax"
    router_renormalize: bool = False
    router_scaling: float = 1.0
    router_groups: int = 1
    router_top_groups: int = 1
    router_balance: float = 0.0
    router: str | list[str] = "top-k"
    router_balance_per_slot: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other fields, and let transformers find the model's class."""
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size // 3) * 8
        for name in ("projection", "attention", "mixer", "router"):
            given = getattr(self, name)
            if isinstance(given, list | tuple) and len(given) != self.num_hidden_layers:
                raise InputError(
                    f"FoveateConfig({name}): {len(given)} texts for {self.num_hidden_layers} "
                    "layers; give one for each layer, or one for all."
                )
        whole(type(self).__name__, "registers", self.registers, least=0)
        if self.moe_layers and not (self.num_experts and self.moe_intermediate_size):
            raise InputError(
                "FoveateConfig(moe_layers=...): give num_experts and moe_intermediate_size too."
            )
        super().__post_init__(**kwargs)
        register_models()

    def of_layer(self, name: str, layer: int) -> str:
        """The projection's, the attention's or the router's text for a layer."""
        given = getattr(self, name)
        return given if isinstance(given, str) else given[layer]

    def mixer_of(self, layer: int) -> str | None:
        """The mixer's text for a layer; None where it has attention."""
        return self.mixer[layer] if isinstance(self.mixer, list | tuple) else self.mixer


class FoveateEncoderConfig(FoveateConfig):
    """Sizes and composition of a bidirectional encoder; fields as in `FoveateConfig`, and these.

    Attributes:
        pooling: what stands for a whole sequence: "mean" or "max" of its real tokens; "cls", the
            first of them; "ends", the last state of both directions of recurrent layers; or a
            pooler of the catalog, such as "lama(heads=8)".
        recurrent_layers: bidirectional GRU layers between the embeddings and the blocks, of which
            there may be none (num_hidden_layers=0); they know the order of tokens themselves.
        embedding_size: width of the embeddings before recurrent layers; None is hidden_size.
        classifier_hidden: width of a hidden layer in the classification head, with ReLU; None is a
            linear head.
        classifier_dropout: of the pooled vector in training, before the classification head.

    Raises:
        InputError: as in `FoveateConfig`; pooling is unknown, the dropout outside [0, 1), or a
            field is given that only goes with recurrent layers.
    """

    model_type = "foveate-encoder"
    keys_to_ignore_at_inference = ["past_key_values", "aux", "pooler_weights"]

    pooling: str = "mean"
    recurrent_layers: int = 0
    embedding_size: int | None = None
    classifier_hidden: int | None = None
    classifier_dropout: float = 0.0
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Check what only an encoder has."""
        poolers = tuple(row.key for row in catalog.rows() if row.kind == "pooler")
        named = str(self.pooling).partition("(")[0].strip()
        if self.pooling not in POOLINGS and named not in poolers:
            raise InputError(
                f"FoveateEncoderConfig(pooling={self.pooling!r}) is unknown; "
                f"{nearest(named, (*POOLINGS, *poolers))}"
            )
        whole("FoveateEncoderConfig", "recurrent_layers", self.recurrent_layers, least=0)
        for name in ("embedding_size", "classifier_hidden"):
            if getattr(self, name) is not None:
                whole("FoveateEncoderConfig", name, getattr(self, name), least=1)
        asked = {
            "pooling='ends'": self.pooling == "ends",
            "embedding_size": self.embedding_size not in (None, self.hidden_size),
        }
        for name, given in asked.items():
            if given and not self.recurrent_layers:
                raise InputError(
                    f"FoveateEncoderConfig({name}) is for recurrent layers; give recurrent_layers."
                )
        if self.recurrent_layers and self.position == "learned":
            raise InputError(
                "FoveateEncoderConfig(position='learned'): recurrent layers know the order; "
                'expected "none", or "rope" for blocks behind them.'
            )
        if not 0 <= self.classifier_dropout < 1:
            raise InputError(
                f"FoveateEncoderConfig(classifier_dropout={self.classifier_dropout!r}): expected 0 "
                "up to, not with, 1."
            )
        super().__post_init__(**kwargs)
