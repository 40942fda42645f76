"""Pooler: how the tokens of a sequence become one vector.

    vector, weights, aux = pooler(x, real)     x (B, L, dim) -> vector (B, width)

Unlike a mixer it changes the shape: out come `width` numbers for each sequence, whatever L is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


class Pooled(NamedTuple):
    """What a pooler returns.

    Attributes:
        vector: (B, width).
        weights: (B, m, L), how much each of m heads looks at each token; rows sum to 1, padding has
            exactly 0.
        aux: losses (names that end with "_loss", already weighted) and statistics.
    """

    vector: Tensor
    weights: Tensor
    aux: dict[str, Tensor]


class PoolerRecipe(ABC):
    """A pooler's hyper-parameters: a frozen dataclass, made by `foveate.methods.make`."""

    @property
    def wants_embeddings(self) -> bool:
        """Whether it asks for the tokens' embeddings, as wide as the tokens that are pooled."""
        return False

    @abstractmethod
    def build(self, dim: int) -> Pooler:
        """The pooler for tokens of this width, with fresh weights."""


class Pooler(nn.Module, ABC):
    """See the module's text.

    Attributes:
        width: numbers in the vector.
    """

    width: int

    @abstractmethod
    def forward(
        self, x: Tensor, real: Tensor | None = None, embeddings: Tensor | None = None
    ) -> Pooled:
        """Pool.

        Args:
            x: (B, L, dim).
            real: (B, L) bool, False on padding, which may hold anything; None is all real.
            embeddings: (B, L, E), the tokens' embeddings, for poolers that ask for them.
        """
