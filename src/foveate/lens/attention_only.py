"""Attention-only language models: the small models whose circuits are read whole.

    x = E[token] + P[position];   x = x + attention(x) for each layer;   logits = x U

No norm, no feed-forward layer, learned positions (Elhage et al. 2021), so that every path from
token to logit is a product of circuits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.nn import Attention
from foveate.ops import causal
from foveate.ops.masks.checks import whole


class AttentionOnly(nn.Module):
    """A causal language model of `foveate.Attention` layers and nothing else.

    Args:
        vocab: tokens.
        dim: width of the residual stream.
        heads: of each layer, each dim / heads wide.
        layers: how many.
        length: longest sequence.

    Raises:
        InputError: a size is below 1.
    """

    def __init__(
        self, vocab: int, dim: int = 64, heads: int = 4, layers: int = 2, length: int = 64
    ) -> None:
        super().__init__()
        sizes = {"vocab": vocab, "dim": dim, "heads": heads, "layers": layers, "length": length}
        for name, value in sizes.items():
            whole("AttentionOnly", name, value, least=1)
        self.embed = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(length, dim)
        self.layers = nn.ModuleList(
            Attention(dim, heads, position="none", layer=n) for n in range(layers)
        )
        self.unembed = nn.Linear(dim, vocab, bias=False)
        for table in (self.embed, self.positions):
            nn.init.normal_(table.weight, std=dim**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, L, vocab) of tokens (B, L)."""
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = x + layer(x, mask=causal()).y
        logits: Tensor = self.unembed(x)
        return logits
