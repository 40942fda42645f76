"""A bidirectional encoder of foveate's layers and a classification head, for transformers.

The blocks of the causal language model (`foveate.models.causal_lm`), in which every token sees all
real tokens of its sequence, before and after it; bidirectional GRU layers before them, or in their
place. The classifier of the LAMA paper, a GRU whose states are pooled by low-rank attention:

    FoveateEncoderConfig(vocab_size=..., num_labels=..., num_hidden_layers=0, recurrent_layers=1,
                         embedding_size=100, hidden_size=128, pooling="lama(heads=8)")
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from foveate.methods import make
from foveate.models.blocks import block_of
from foveate.models.causal_lm import FoveatePreTrained, gathered
from foveate.models.config import POOLINGS, FoveateEncoderConfig
from foveate.models.masking import seen_by
from foveate.models.position import last_norm, positioned, positions_of
from foveate.models.recurrent import BiGRU
from foveate.models.reference import stream_of
from foveate.models.registers import fronted, ids_behind, registers_of
from foveate.nn import Block
from foveate.ops.errors import InputError
from foveate.parts.context import Context
from foveate.parts.pooler import Pooler
from foveate.parts.rope import Rope
from foveate.parts.tree import Tree


@dataclass
class EncoderOutput(ModelOutput):
    """What the encoder returns.

    last_hidden_state (B, L, dim), meaningless on padding; pooler_output (B, dim, or a pooler's
    width), see `FoveateEncoderConfig.pooling`; hidden_states: (B, L, dim) before each block and
    after the last norm, if asked for; aux: losses, each a mean over the layers that have it, and
    statistics as "layers.<i>.<name>"; pooler_weights (B, m, L), what each head of a pooler looks
    at, see `foveate.models.word_picture`.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux: dict[str, Tensor] | None = None
    pooler_weights: Tensor | None = None


@dataclass
class ClassifierOutput(ModelOutput):
    """What the classifier returns.

    loss, with the auxiliary losses of layers and pooler in training; logits (B, labels);
    hidden_states, aux and pooler_weights as in `EncoderOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux: dict[str, Tensor] | None = None
    pooler_weights: Tensor | None = None


class FoveateEncoder(FoveatePreTrained):
    """The blocks without a head: every token sees every real token.

    Args:
        config: sizes and composition.
    """

    config_class = FoveateEncoderConfig
    config: FoveateEncoderConfig
    base_model_prefix = "encoder"

    def __init__(self, config: FoveateEncoderConfig) -> None:
        super().__init__(config)
        width = config.embedding_size or config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.registers = registers_of(config.registers, width)
        self.recurrent: BiGRU | None = None
        if config.recurrent_layers:
            if self.registers is not None:
                raise InputError(
                    "FoveateEncoderConfig(registers): recurrent layers would read them as text; "
                    "leave them out."
                )
            self.recurrent = BiGRU(width, config.hidden_size, config.recurrent_layers)
        ropes: dict[tuple[int, bool], Rope | None] = {}
        self.layers = nn.ModuleList(
            block_of(config, i, ropes) for i in range(config.num_hidden_layers)
        )
        if stream_of(self.blocks, config.hidden_size) is not None:
            raise InputError(
                "FoveateEncoderConfig(mixer): a mixer with a reference stream is made for causal "
                "language models; use another one here."
            )
        self.embed_positions = positions_of(config)
        bare = self.recurrent is not None and not self.blocks
        self.norm = nn.Identity() if bare else last_norm(config, self.blocks)
        self.pooler: Pooler | None = None
        if config.pooling not in POOLINGS:
            recipe = make(config.pooling)
            if recipe.wants_embeddings and width != config.hidden_size:
                raise InputError(
                    f"FoveateEncoderConfig(pooling={config.pooling!r}) pools with the embeddings; "
                    f"expected them as wide as the tokens, {config.hidden_size}, but "
                    f"embedding_size is {width}."
                )
            self.pooler = recipe.build(config.hidden_size)
        self.post_init()

    def extra_repr(self) -> str:
        """What torch prints of it; checkpoints of a training tell by it what they are of."""
        pooling = self.config.pooling
        return "" if self.pooler is not None or pooling == "mean" else f"pooling={pooling!r}"

    @property
    def pooled_size(self) -> int:
        """Width of the vector that stands for a sequence."""
        return self.config.hidden_size if self.pooler is None else self.pooler.width

    @property
    def blocks(self) -> list[Block]:
        """The layers, by their type."""
        return [cast(Block, layer) for layer in self.layers]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        tree: Tree | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> EncoderOutput | tuple[Any, ...]:
        """Run all blocks on input_ids (B, L) or inputs_embeds (B, L, dim).

        Args:
            input_ids: (B, L).
            attention_mask: (B, L), 1 for real tokens; padding in front or behind.
            position_ids: 0, 1, 2, ...; they may start again from 0 where packed sequences begin.
            inputs_embeds: in place of input_ids.
            tree: over the tokens, for attentions that follow one ("hsa").
            output_hidden_states: whether to return what the blocks saw.
            return_dict: False for a tuple.
            kwargs: nothing that counts here; transformers' callers pass more than is needed.

        Raises:
            InputError: both or neither input is given, a sequence has no real token, or masks or
                positions that `foveate.models.masking.seen_by` refuses.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("Give either input_ids or inputs_embeds.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if tree is not None and self.registers is not None:
            raise InputError("tree: this model's register tokens stand in no tree; leave it out.")
        x, attention_mask, position_ids, _, front = fronted(
            self.registers, x, attention_mask, position_ids, 0
        )
        seen = seen_by(attention_mask, position_ids, x.shape[0], 0, x.shape[1], both_ways=True)
        if seen.real is not None and not bool(seen.real.any(1).all()):
            raise InputError(
                "attention_mask: a sequence has no real token, so nothing stands for it; leave it "
                "out of the batch."
            )
        if self.recurrent is not None and seen.mask is not None and seen.real is None:
            raise InputError(
                "position_ids: recurrent layers read a row as one sequence; give packed sequences "
                "as rows of a batch."
            )
        tokens, x = x, positioned(self.embed_positions, x, 0, seen, position_ids)
        if self.recurrent is not None:
            x = self.recurrent(x, seen.real)
        ctx = Context(
            mask=seen.mask,
            q_positions=seen.q_positions,
            kv_positions=seen.kv_positions,
            phase="train" if self.training else "prefill",
            tree=tree,
            ids=ids_behind(front, input_ids),
            embeddings=tokens,
        )
        states = [x]
        found: list[dict[str, Tensor]] = []
        for i, block in enumerate(self.blocks):
            x, _, aux = block(x, replace(ctx, layer=i), None, seen.real)
            states.append(x)
            found.append(aux)
        states[-1] = self.norm(x)
        if front:
            states = [state[:, front:] for state in states]
        x, tokens = states[-1], tokens[:, front:]
        real = None if seen.real is None else seen.real[:, front:]
        aux, weights = gathered(found), None
        if self.pooler is None:
            vector = pooled(x, real, self.config.pooling)
        else:
            vector, weights, more = self.pooler(x, real, tokens)
            aux |= more
        out = EncoderOutput(
            last_hidden_state=x,
            pooler_output=vector,
            hidden_states=tuple(states) if output_hidden_states else None,
            aux=aux or None,
            pooler_weights=weights,
        )
        return out.to_tuple() if return_dict is False else out


class FoveateForSequenceClassification(FoveatePreTrained):
    """The encoder with a head on its pooled vector: linear, or with one hidden layer.

    As in transformers, `config.num_labels` counts the classes, and `config.problem_type`
    ("single_label_classification", "multi_label_classification" or "regression") chooses the loss;
    left out, it follows from the labels.

    Args:
        config: sizes and composition.
    """

    config_class = FoveateEncoderConfig
    config: FoveateEncoderConfig
    base_model_prefix = "encoder"

    def __init__(self, config: FoveateEncoderConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.encoder = FoveateEncoder(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        width, hidden = self.encoder.pooled_size, config.classifier_hidden
        self.classifier_hidden = None if hidden is None else nn.Linear(width, hidden)
        self.classifier = nn.Linear(hidden or width, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        tree: Tree | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ClassifierOutput | tuple[Any, ...]:
        """Classify sequences.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L), 1 for real tokens; padding in front or behind.
            position_ids: as in the encoder.
            inputs_embeds: (B, L, dim) in place of input_ids.
            labels: (B,) classes, (B, labels) of 0 and 1 for several, or numbers for a regression.
            tree: as in the encoder.
            output_hidden_states: whether to return what the blocks saw.
            return_dict: False for a tuple.
            kwargs: what the loss takes.

        Raises:
            InputError: as in the encoder.
        """
        inner = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            tree=tree,
            output_hidden_states=output_hidden_states,
        )
        vector = self.dropout(inner.pooler_output)
        if self.classifier_hidden is not None:
            vector = self.classifier_hidden(vector).relu()
        logits = self.classifier(vector)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, **kwargs
            )
            losses = [v for name, v in (inner.aux or {}).items() if name.endswith("_loss")]
            if self.training and losses:
                loss = loss + torch.stack(losses).sum().to(loss.dtype)
        out = ClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=inner.hidden_states,
            aux=inner.aux,
            pooler_weights=inner.pooler_weights,
        )
        return out.to_tuple() if return_dict is False else out


def pooled(x: Tensor, real: Tensor | None, how: str) -> Tensor:
    """One vector for each sequence.

    Args:
        x: (B, L, dim).
        real: (B, L) bool, False on padding; None is all real.
        how: "mean" or "max" of the real tokens; "cls", the first of them; "ends", the first half
            of the last one and the second half of the first: where the directions of a GRU end.

    Returns:
        (B, dim).
    """
    if how == "max":
        return (x if real is None else x.masked_fill(~real[..., None], -torch.inf)).amax(1)
    if how == "ends":
        last = torch.full_like(x[:, 0, 0], x.shape[1] - 1, dtype=torch.int64)
        first = torch.zeros_like(last)
        if real is not None:
            first, last = real.int().argmax(1), last - real.flip(1).int().argmax(1)
        rows, half = torch.arange(len(x), device=x.device), x.shape[2] // 2
        return torch.cat((x[rows, last, :half], x[rows, first, half:]), 1)
    if how == "cls":
        if real is None:
            return x[:, 0]
        first = real.int().argmax(1)
        return x[torch.arange(len(x), device=x.device), first]
    if real is None:
        return x.mean(1)
    # Padding may hold anything, NaN included: it is left out, not multiplied by 0.
    return x.masked_fill(~real[..., None], 0).sum(1) / real.sum(1, keepdim=True).to(x.dtype)
