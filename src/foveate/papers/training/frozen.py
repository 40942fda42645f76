"""A head that is trained on an encoder that isn't: frozen, of random weights, and sees context.

    x_t  = E[token] + s (P[t] + S[segment])                     segment 1 begins at the mark
    h    = LN(x),  q = h W_q                                     for each head; the keys are q, too
    x   += softmax(c q q^T / sqrt(d_h)) h W_v,  then  x += W_down gelu(W_up LN(x))
    out  = LN(x)

Queries that are their own keys make equal tokens attend to each other more than to others, so that
features tell of their context, as those of a trained encoder would; the larger c, the more of the
answer they give away. A head that mixes no tokens, on the same features, shows how much that is.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.ops.errors import InputError


class RandomEncoder(nn.Module):
    """The frozen encoder; see the module's text.

    Args:
        vocab: tokens.
        dim: width of its features.
        length: the longest input, in tokens.
        mark: the token with which segment 1 begins.
        layers, heads: of attention; heads divide the width.
        sharpness: c.
        place: s.

    Raises:
        InputError: heads don't divide the width.
    """

    def __init__(
        self,
        vocab: int,
        dim: int = 128,
        length: int = 16,
        mark: int = 1,
        *,
        layers: int = 1,
        heads: int = 4,
        sharpness: float = 0.05,
        place: float = 0.5,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise InputError(f"RandomEncoder: {heads} heads don't divide a width of {dim}.")
        self.dim, self.mark, self.heads = dim, mark, heads
        self.sharpness, self.place = sharpness, place
        self.tokens = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(length, dim)
        self.segments = nn.Embedding(2, dim)
        self.query, self.value, self.up, self.down = (
            nn.ModuleList(nn.Linear(wide, tall) for _ in range(layers))
            for wide, tall in ((dim, dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim))
        )
        self.requires_grad_(False)
        for query in self.query:
            weight, bias = query.parameters()
            nn.init.normal_(weight, std=dim**-0.5)
            nn.init.zeros_(bias)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """Features (B, L, dim) of token ids (B, L) without padding."""
        segment = (ids == self.mark).cumsum(1).clamp(max=1)
        where = self.positions.weight[: ids.shape[1]] + self.segments(segment)
        x = self.tokens(ids) + self.place * where
        for query, value, up, down in zip(self.query, self.value, self.up, self.down):
            h = self._normed(x)
            q = query(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            weights = (self.sharpness * q @ q.mT / q.shape[-1] ** 0.5).softmax(-1)
            seen = weights @ h.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            x = x + value(seen.transpose(1, 2).flatten(-2))
            x = x + down(functional.gelu(up(self._normed(x))))
        return self._normed(x)

    def _normed(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (self.dim,))


class OnFrozen(nn.Module):
    """A classifier behind a frozen encoder and a linear map that is trained, for `train`.

    Args:
        encoder: of features.
        head: a `foveate.models.FoveateForSequenceClassification`; its embeddings are neither used
            nor trained, since the encoder knows places.
    """

    def __init__(self, encoder: RandomEncoder, head: Any) -> None:
        super().__init__()
        self.frozen, self.head = encoder, head
        self.reduced = nn.Linear(encoder.dim, head.config.hidden_size)
        for name, parameter in head.named_parameters():
            if "embed_" in name:
                parameter.requires_grad_(False)
            if "embed_positions" in name:
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Any:
        """Token ids (B, L), none of them padding; returns logits (B, 1, classes)."""
        out = self.head(inputs_embeds=self.reduced(self.frozen(ids)))
        return SimpleNamespace(logits=out.logits[:, None], aux=getattr(out, "aux", None))
