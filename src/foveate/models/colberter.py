"""The whole ColBERTer: a text encoder of transformers, its tokenizer, and ColBERTer's head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.methods.colberter import Bags, Colberter, ColberterHead, Encoding
from foveate.models.whole_words import Tokens, WordTokenizer
from foveate.ops.errors import InputError


class ColberterModel(nn.Module):
    """Encodes questions and passages, each alone.

    Args:
        encoder: gives `last_hidden_state` (B, L, H) from input_ids and attention_mask, such as a
            BertModel.
        tokenizer: its fast tokenizer.
        recipe: of the head.
        length: most sub-words of a text.
        stem: stem whole words.

    Raises:
        InputError: the encoder's size isn't known, or it has fewer positions than `length`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: Any,
        recipe: Colberter | None = None,
        *,
        length: int = 256,
        stem: bool = True,
    ) -> None:
        super().__init__()
        recipe = Colberter() if recipe is None else recipe
        config: Any = getattr(encoder, "config", None)
        dim = getattr(config, "hidden_size", None)
        if not isinstance(dim, int):
            raise InputError("ColberterModel: the encoder's config names no hidden_size.")
        most = getattr(config, "max_position_embeddings", length)
        if length > most:
            raise InputError(f"length={length}: the encoder has {most} positions.")
        self.encoder, self.recipe = encoder, recipe
        self.words = WordTokenizer(tokenizer, length=length, stem=stem, whole=recipe.whole_words)
        self.head = recipe.build(dim)
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad = 0 if pad is None else int(pad)

    def use(self, head: ColberterHead) -> None:
        """Take a head, with the tokens that its recipe wants.

        Raises:
            InputError: it is for states of another size.
        """
        if head.dim != self.head.dim:
            raise InputError(f"The head reads {head.dim} numbers, the encoder has {self.head.dim}.")
        self.head, self.recipe = head, head.recipe
        self.words.whole = head.recipe.whole_words

    @property
    def device(self) -> torch.device:
        """Where the encoder lies."""
        return next(self.encoder.parameters()).device

    def states(self, tokens: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        """The encoder's states (B, L, H), and which tokens are real (B, L)."""
        longest = max(len(one.ids) for one in tokens)
        ids = torch.full((len(tokens), longest), self.pad, dtype=torch.long)
        real = torch.zeros(len(tokens), longest, dtype=torch.bool)
        for row, one in enumerate(tokens):
            ids[row, : len(one.ids)] = torch.tensor(one.ids)
            real[row, : len(one.ids)] = True
        ids, real = ids.to(self.device), real.to(self.device)
        out = self.encoder(input_ids=ids, attention_mask=real.long())
        return out.last_hidden_state, real

    def forward(
        self, texts: Sequence[str] | Sequence[Tokens], *, passage: bool, drop: bool | None = None
    ) -> Encoding:
        """Encode a batch of texts; arguments as in `ColberterHead.forward`.

        Raises:
            InputError: there is no text.
        """
        if not texts:
            raise InputError("ColberterModel: expected at least one text.")
        tokens = [one for one in texts if isinstance(one, Tokens)]
        if len(tokens) != len(texts):
            tokens = self.words([str(one) for one in texts])
        states, real = self.states(tokens)
        bags = Bags.of([one.words for one in tokens], states.shape[1], str(states.device))
        return self.head(states, bags, real, passage=passage, drop=drop)

    @torch.no_grad()
    def encodings(
        self, tokens: Sequence[Tokens], *, passage: bool, batch: int = 32
    ) -> Iterator[tuple[list[int], Encoding]]:
        """Encode many texts, short ones together; yields the places of a batch and its encoding."""
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i].ids))
        for start in range(0, len(order), batch):
            at = order[start : start + batch]
            yield at, self([tokens[i] for i in at], passage=passage)
