"""Routers of mixtures of experts: how tokens are scored, and with whom they share their scores.

    l = scores(u)                   (..., E) logits
    r = softmax(l)                  a token's own distribution over experts
    rbar = relation(u, r, around)   with a relation: averages over related tokens
    the best K of rbar run, on the token's own u

Scores may choose by other logits (`Scores.choose`); the chosen are weighed by rbar all the same.
`foveate.nn.Router` puts the parts together. A recipe names them in the catalog.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from foveate.ops.masks.checks import whole
from foveate.parts.again import Again
from foveate.parts.cache import Field
from foveate.parts.context import Context
from foveate.parts.kv_cache import TokenCache


@dataclass
class Around:
    """What a router may know of tokens, besides u.

    Attributes:
        ctx: mask and positions, over all tokens, those in the cache included; ids of the new ones.
        again: the attention layer's weights; None where no relation asks for them.
        cache: what a relation keeps of earlier tokens; None without a past.
    """

    ctx: Context = field(default_factory=Context)
    again: Again | None = None
    cache: TokenCache | None = None


class Choice(NamedTuple):
    """Logits (..., E) of somebody else than who weighs.

    Attributes:
        logits: (..., E).
        learning: True: they learn what the weights choose (cross entropy). False: they choose
            themselves, and are frozen, so that the load can't be balanced any more.
    """

    logits: Tensor
    learning: bool


class Scores(nn.Module, ABC):
    """From tokens to logits over experts.

    Attributes:
        temperature: of the softmax whose mean the load-balance loss is taken of.
    """

    temperature: float = 1.0

    @abstractmethod
    def forward(self, u: Tensor) -> Tensor:
        """From u (..., dim) in fp32 or wider to logits (..., E)."""

    def choose(self, u: Tensor, around: Around) -> Choice | None:
        """Other logits for u (..., dim) to choose by; None where those of `forward` do, as mostly.

        Args:
            u: as in `forward`.
            around: what else is known of the tokens.
        """
        return None

    @property
    def learning(self) -> bool:
        """Whether `choose` learns now, which adds a loss."""
        return False

    def count(self, top_k: int) -> int:
        """How many experts run for a token now, where top_k were asked for."""
        return top_k

    def advance(self, share: float) -> None:
        """Hear which share of the training is done, from 0 to 1; mostly nothing changes."""


class Relation(nn.Module, ABC):
    """Which tokens' distributions are averaged into a token's own.

    Attributes:
        wants_weights: whether it reads the weights of the attention layer before it.
    """

    wants_weights: bool = False

    @abstractmethod
    def fields(self, experts: int) -> tuple[Field, ...]:
        """What a cache keeps of each token."""

    @abstractmethod
    def forward(self, u: Tensor, routes: Tensor, around: Around) -> Tensor:
        """Average.

        Args:
            u: (B, L, dim), the layer's input, in fp32 or wider.
            routes: (B, L, E), the tokens' own distributions r(u).
            around: mask, weights and past.

        Returns:
            rbar (B, L, E), rows that are distributions; a token that may see nobody keeps its own.
        """


class RouterParts(NamedTuple):
    """What a recipe builds: scores, None for a linear map, and a relation, None for none."""

    scores: Scores | None = None
    relation: Relation | None = None


@dataclass(frozen=True)
class RouterSizes:
    """The sizes of a layer that a router is built for.

    Attributes:
        dim: width of u.
        experts: E.
        heads: query heads of the attention layer before it, 0 where there is none.
        vocab: how many ids tokens have, 0 where they have none.

    Raises:
        InputError: a size below 1.
    """

    dim: int
    experts: int
    heads: int = 0
    vocab: int = 0

    def __post_init__(self) -> None:
        whole("RouterSizes", "dim", self.dim, least=1)
        whole("RouterSizes", "experts", self.experts, least=1)
        whole("RouterSizes", "heads", self.heads, least=0)
        whole("RouterSizes", "vocab", self.vocab, least=0)


class RouterRecipe(ABC):
    """A router's hyper-parameters: a frozen dataclass, made by `foveate.methods.make`."""

    @abstractmethod
    def build(self, sizes: RouterSizes) -> RouterParts:
        """The parts for these sizes, with fresh weights.

        Raises:
            InputError: the hyper-parameters don't fit the sizes.
        """


def advance(model: nn.Module, share: float) -> None:
    """Tell all routers of a model which share of the training is done, from 0 to 1.

    For routers that change on the way ("smoe-dropout", "stable-moe"); a training loop calls it
    before each step. It depends on nothing else, so a training that is resumed goes on alike.
    """
    for module in model.modules():
        if isinstance(module, Scores):
            module.advance(share)
