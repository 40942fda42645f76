"""A causal language model of foveate's layers, as a transformers PreTrainedModel.

Pre-norm blocks of RMSNorm, `foveate.Attention`, RMSNorm and SwiGLU or experts, rotary positions, a
final RMSNorm and a linear head: what Llama, Step-3 and DeepSeek-V3 have in common. `generate`,
`save_pretrained`, Trainer and everything else that transformers does with a model work on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from foveate.models.blocks import block_of
from foveate.models.cache import ModelCache
from foveate.models.config import FoveateConfig
from foveate.models.masking import Seen, seen_by
from foveate.models.position import last_norm, positioned, positions_of
from foveate.models.reference import stream_of
from foveate.models.registers import fronted, ids_behind, registers_of
from foveate.nn import Block
from foveate.ops import causal
from foveate.ops.errors import InputError
from foveate.parts.context import Context
from foveate.parts.rope import Rope


@dataclass
class CausalLMOutput(ModelOutput):
    """What the model returns.

    loss: next-token cross entropy, with the layers' auxiliary losses in training; logits (B, L,
    vocab); past_key_values: the cache; hidden_states: (B, L, dim) before each block and after the
    last norm, if asked for; aux: losses, each a mean over the layers that have it, and statistics
    as "layers.<i>.<name>".
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: ModelCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux: dict[str, Tensor] | None = None


@dataclass
class ModelOutputWithAux(ModelOutput):
    """As CausalLMOutput, without a head: last_hidden_state (B, L, dim)."""

    last_hidden_state: Tensor | None = None
    past_key_values: ModelCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux: dict[str, Tensor] | None = None


class FoveatePreTrained(PreTrainedModel):
    """What all models share."""

    config_class = FoveateConfig
    config: FoveateConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecomputedBlock"]
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights; our own modules know how theirs start."""
        super()._init_weights(module)
        ours = type(module).__module__.partition(".")[0] == __name__.partition(".")[0]
        if ours and hasattr(module, "reset_parameters"):
            cast(Any, module).reset_parameters()


class FoveateModel(FoveatePreTrained):
    """The blocks without the head.

    Args:
        config: sizes and composition.
    """

    def __init__(self, config: FoveateConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.registers = registers_of(config.registers, config.hidden_size)
        ropes: dict[tuple[int, bool], Rope | None] = {}  # one for all layers, so are its tables
        self.layers = nn.ModuleList(
            block_of(config, i, ropes) for i in range(config.num_hidden_layers)
        )
        self.reference = stream_of(self.blocks, config.hidden_size)
        if self.reference is not None and self.registers is not None:
            raise InputError(
                "FoveateConfig(registers): a mixer with a reference stream counts the text's own "
                "tokens; leave the registers out."
            )
        self.embed_positions = positions_of(config)
        self.norm = last_norm(config, self.blocks)
        self.post_init()

    @property
    def blocks(self) -> list[Block]:
        """The layers, by their type."""
        return [cast(Block, layer) for layer in self.layers]

    def embedded(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token embeddings of ids (1, n), and what goes into the first block: positions added."""
        tokens = self.embed_tokens(ids)
        return tokens, positioned(self.embed_positions, tokens, 0, Seen(causal()), None)

    def set_reference(self, ids: Tensor) -> None:
        """Give the fixed sequence that "fixed-seq-qk" takes its queries and keys from.

        Args:
            ids: integer (length,), of at least the length that the mixers were built with.

        Raises:
            InputError: the model has no such mixer, or the ids don't fit.
        """
        if self.reference is None:
            raise InputError("set_reference: no mixer of this model has a reference stream.")
        self.reference.set_tokens(ids, self.config.vocab_size)

    def new_cache(self, capacity: int = 0) -> ModelCache:
        """An empty cache with room for `capacity` tokens."""
        made = (block.new_cache(capacity) for block in self.blocks)
        return ModelCache(made, self.config.registers)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ModelCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutputWithAux:
        """Run all blocks on input_ids (B, L) or inputs_embeds (B, L, dim).

        Raises:
            InputError: both or neither are given, masks or positions that `seen_by` refuses, or a
                cache of another model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("Give either input_ids or inputs_embeds.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache()
        if past_key_values is not None and not isinstance(past_key_values, ModelCache):
            raise InputError(
                f"past_key_values is a {type(past_key_values).__name__}, which can't hold what "
                "these layers keep; make one with model.new_cache(), or leave it out."
            )
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        x, attention_mask, position_ids, past, front = fronted(
            self.registers, x, attention_mask, position_ids, past
        )
        seen = seen_by(attention_mask, position_ids, x.shape[0], past, x.shape[1])
        tokens, x = x, positioned(self.embed_positions, x, past, seen, position_ids)
        ctx = Context(
            mask=seen.mask,
            q_positions=seen.q_positions,
            kv_positions=seen.kv_positions,
            phase="decode" if past and x.shape[1] == 1 else "train" if self.training else "prefill",
            ids=ids_behind(front, input_ids),
            embeddings=tokens,
        )
        if self.reference is not None:
            ctx.reference = self.reference.maps(self, past + x.shape[1], ctx.phase)
        states = [x]
        found: list[dict[str, Tensor]] = []
        for i, block in enumerate(self.blocks):
            held = None if past_key_values is None else past_key_values.layers[i].held
            x, _, aux = block(x, replace(ctx, layer=i), held, seen.real)
            states.append(x)
            found.append(aux)
        states[-1] = self.norm(x)
        if front:
            states = [state[:, front:] for state in states]
        x = states[-1]
        return ModelOutputWithAux(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
            aux=gathered(found),
        )


class FoveateForCausalLM(FoveatePreTrained, GenerationMixin):
    """The language model.

    Args:
        config: sizes and composition.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FoveateConfig) -> None:
        super().__init__(config)
        self.model = FoveateModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give `generate` our cache, whose layers keep their own kinds of entries."""
        if generation_config.cache_implementation is not None:
            raise InputError(
                f"cache_implementation={generation_config.cache_implementation!r}: a foveate model "
                "has a cache of its own; leave it out, or pass past_key_values=model.new_cache()."
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()

    def set_reference(self, ids: Tensor) -> None:
        """As `FoveateModel.set_reference`."""
        self.model.set_reference(ids)

    def new_cache(self, capacity: int = 0) -> ModelCache:
        """An empty cache with room for `capacity` tokens."""
        return self.model.new_cache(capacity)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ModelCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Predict the next token.

        Args:
            input_ids: (B, L).
            attention_mask: (B, past + L), 1 for real tokens; padding in front or behind.
            position_ids: as transformers makes them; see `foveate.models.masking.seen_by`.
            past_key_values: a cache of this model, see `new_cache`.
            inputs_embeds: (B, L, dim) in place of input_ids.
            labels: (B, L), -100 for positions that don't count; shifted here.
            use_cache: whether to make a cache; None is the config's choice, never in training.
            output_hidden_states: whether to return what the blocks saw.
            logits_to_keep: how many of the last positions get logits, 0 for all; or their indices.
            return_dict: False for a tuple.
            kwargs: what the loss takes, such as num_items_in_batch.
        """
        inner = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        x = inner.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            x = x[:, logits_to_keep]
        elif logits_to_keep:
            x = x[:, -logits_to_keep:]
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            losses = [v for name, v in inner.aux.items() if name.endswith("_loss")]
            if self.training and losses:
                loss = loss + torch.stack(losses).sum().to(loss.dtype)
        out = CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=inner.past_key_values,
            hidden_states=inner.hidden_states,
            aux=inner.aux or None,
        )
        return out.to_tuple() if return_dict is False else out


def gathered(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the layers told: losses as means over those that have them, statistics by layer."""
    losses: dict[str, list[Tensor]] = {}
    out: dict[str, Tensor] = {}
    for i, aux in enumerate(layers):
        for name, value in aux.items():
            if name.endswith("_loss"):
                losses.setdefault(name, []).append(value)
            else:
                out[f"layers.{i}.{name}"] = value
    return out | {name: torch.stack(values).mean() for name, values in losses.items()}
