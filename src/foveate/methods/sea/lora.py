"""Separate paths for the estimator and for the scores: changes made from the layer's input."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from foveate.ops.errors import InputError
from foveate.parts.attention import Heads
from foveate.parts.projection import split_heads


class Split(NamedTuple):
    """q, k, v for the estimator (B, H, L, .), and q_score, k_score for exact attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_score: Tensor
    k_score: Tensor


class Lora(nn.Module):
    """x A B added to each, B starting at 0, so that it begins as one path.

    Args:
        heads: sizes of the layer.
        rank: of each change.
    """

    def __init__(self, heads: Heads, rank: int) -> None:
        super().__init__()
        self.sizes = heads
        widths = {
            "q": heads.query * heads.key_dim,
            "k": heads.kv * heads.key_dim,
            "v": heads.kv * heads.value_dim,
            "q_score": heads.query * heads.key_dim,
            "k_score": heads.kv * heads.key_dim,
        }
        self.down = nn.ModuleDict({n: nn.Linear(heads.dim, rank, bias=False) for n in widths})
        self.up = nn.ModuleDict({n: nn.Linear(rank, w, bias=False) for n, w in widths.items()})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start without a change."""
        for one in self.up.values():
            assert isinstance(one, nn.Linear)
            nn.init.zeros_(one.weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> Split:
        """Shapes as in a call; x (B, L, dim).

        Raises:
            InputError: no x.
        """
        if x is None:
            raise InputError(
                "SEA(lora=...) changes q, k and v from the layer's input: run it inside "
                "foveate.Attention, or give Context(hidden=x)."
            )
        base = {"q": q, "k": k, "v": v, "q_score": q, "k_score": k}
        return Split(
            **{
                name: held + split_heads(self.up[name](self.down[name](x)), held.shape[1])
                for name, held in base.items()
            }
        )
