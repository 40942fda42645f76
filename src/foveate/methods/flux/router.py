"""Flux's layer router: from pooled queries to the odds of full against sparse attention.

    u = mean over heads of the mean of Qn over the prompt's first p and last p tokens     (d)
    z = W2 SiLU(W1 u)                       d -> 8d -> 2d
    logits = router head of z               2d -> 4d -> SiLU -> d -> SiLU -> 2

Index 0 is sparse, index 1 is full attention. Qn are queries before their rotation. Flux Attention,
arXiv 2604.07394, section on the Layer Router.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.context import Context

SPARSE, FULL = 0, 1
BIAS = 4.5  # P(full) = sigmoid(4.5) = 0.989 at first


class LayerRouter(nn.Module):
    """The router of one layer; 592,002 weights for heads of 128.

    Args:
        dim: head size d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = whole("LayerRouter", "dim", dim, least=1)
        self.encoder = nn.Sequential(
            nn.Linear(dim, 8 * dim), nn.SiLU(), nn.Linear(8 * dim, 2 * dim)
        )
        self.head = nn.Sequential(
            nn.Linear(2 * dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim), nn.SiLU(),
            nn.Linear(dim, 2),
        )  # fmt: skip
        for layer in (*self.encoder, *self.head):
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
                nn.init.zeros_(layer.bias)
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([0.0, BIAS]))

    @torch.no_grad()
    def standardize(self, u: Tensor) -> None:
        """Begin where u (N, d) has mean 0 and, over all of its elements, variance 1.

        The first layer takes it up, W1 (u - mean) / deviation, so the router stays the paper's.
        Its start alone is ours: what pooled queries have in common is several times larger than
        what tells them apart, and moves all prompts together while steps are few.
        """
        first = self.encoder[0]
        assert isinstance(first, nn.Linear)
        mean = u.mean(0)
        deviation = float((u - mean).square().mean().sqrt())
        if deviation > 1e-5 * float(u.abs().max()):  # else they are alike but for rounding
            first.weight.div_(deviation)
        first.bias.copy_(-(first.weight @ mean))

    def forward(self, u: Tensor) -> Tensor:
        """Pooled queries (B, d) to logits (B, 2)."""
        if u.shape[-1] != self.dim:
            raise InputError(
                f"This router is for heads of {self.dim}, but the queries have {u.shape[-1]}; was "
                "it fitted on another model?"
            )
        logits: Tensor = self.head(self.encoder(u))
        return logits


class Routers(nn.Module):
    """A router for each layer, by its number."""

    def __init__(self, layers: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.by_layer = nn.ModuleDict({str(layer): LayerRouter(dim) for layer in layers})
        self.dim = dim

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have one."""
        return tuple(int(name) for name in self.by_layer)

    def logits(self, layer: int, u: Tensor) -> Tensor:
        """(B, 2) of one layer, from pooled queries (B, d)."""
        logits: Tensor = self._of(layer)(u)
        return logits

    def standardize(self, layer: int, u: Tensor) -> None:
        """`LayerRouter.standardize` of one layer."""
        self._of(layer).standardize(u)

    def _of(self, layer: int) -> LayerRouter:
        if str(layer) not in self.by_layer:
            raise InputError(
                f"Layer {layer} has no router; there are routers for {sorted(self.layers)}."
            )
        router = self.by_layer[str(layer)]
        assert isinstance(router, LayerRouter)
        return router


def pooled(q: Tensor, ctx: Context, rows: list[Tensor], size: int) -> Tensor:
    """Pooled queries u (B, d) in fp32, from queries (B, H, L, d).

    Args:
        q: as the attention is given them.
        ctx: tells how they were before their rotation, as `raw_query` or `query_rope`.
        rows: for each sequence the indices of its prompt's tokens, in order.
        size: p; where a prompt is shorter the two parts overlap.
    """
    found = []
    for b, at in enumerate(rows):
        some = torch.cat((at[:size], at[-size:]))
        if ctx.raw_query is not None:
            x = ctx.raw_query[b : b + 1, :, some]
        elif ctx.query_rope is not None:
            rope, positions = ctx.query_rope
            own = positions if positions.dim() == 1 else positions[b if len(positions) > 1 else 0]
            x = rope.unrotate(q[b : b + 1, :, some], own[some])
        else:
            x = q[b : b + 1, :, some]
        found.append(x.float().mean((0, 1, 2)))
    return torch.stack(found)
