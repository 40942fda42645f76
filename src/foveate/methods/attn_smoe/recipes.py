"""The routers of `foveate.models.FoveateConfig(router=...)` and their hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Literal

from typing_extensions import override

from foveate.methods.attn_smoe.relations import HEADS, AttentionRelation, SimilarityRelation
from foveate.methods.attn_smoe.scores import CosineScores, FrozenScores, StableScores
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole
from foveate.parts.projection import positive
from foveate.parts.routing import RouterParts, RouterRecipe, RouterSizes


@dataclass(frozen=True)
class TopK(RouterRecipe):
    """A linear router: each token on its own, r(u) = softmax(W u).

    The other fields of the model's config (`router_score`, groups, ...) say how experts are chosen.
    """

    @override
    def build(self, sizes: RouterSizes) -> RouterParts:
        return RouterParts()


@dataclass(frozen=True)
class Similarity(RouterRecipe):
    """Averages over tokens that are alike, S_ij = softmax_j(u_i^T W_s u_j / tau).

    Attributes:
        tau: temperature; None is sqrt(D). With large norms a token is most like itself by far, and
            S nearly the identity: then a larger tau, or `normalize`.
        learned: whether W_s is trained from the identity on.
        normalize: whether tokens are scaled to one norm, sqrt(D), before they are compared.

    Raises:
        InputError: tau isn't above 0.
    """

    tau: float | None = None
    learned: bool = True
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.tau is not None:
            positive("similarity-smoe", tau=self.tau)

    @override
    def build(self, sizes: RouterSizes) -> RouterParts:
        tau = sqrt(sizes.dim) if self.tau is None else self.tau
        made = SimilarityRelation(sizes.dim, tau, learned=self.learned, normalize=self.normalize)
        return RouterParts(relation=made)


@dataclass(frozen=True)
class AttentionAware(RouterRecipe):
    """Averages by the weights of the attention layer in the same block.

    Attributes:
        heads: how the heads' matrices become one: "mean", "learned" or "posterior".
        spread: s of "posterior"; None is sqrt(D).

    Raises:
        InputError: heads is unknown, or spread isn't above 0 or given for another rule.
    """

    heads: Literal["mean", "learned", "posterior"] = "mean"
    spread: float | None = None

    def __post_init__(self) -> None:
        if self.heads not in HEADS:
            raise InputError(
                f"attention-smoe(heads={self.heads!r}) is unknown; "
                f"{nearest(str(self.heads), HEADS)}"
            )
        if self.spread is not None:
            positive("attention-smoe", spread=self.spread)
            if self.heads != "posterior":
                raise InputError(
                    f"attention-smoe(spread={self.spread:g}) is for heads='posterior'."
                )

    @override
    def build(self, sizes: RouterSizes) -> RouterParts:
        if not sizes.heads:
            raise InputError(
                "attention-smoe: there is no attention in this layer (a mixer stands in its "
                "place); use 'similarity-smoe', or 'top-k'."
            )
        spread = sqrt(sizes.dim) if self.spread is None else self.spread
        return RouterParts(relation=AttentionRelation(sizes.heads, self.heads, spread))


@dataclass(frozen=True)
class XMoE(RouterRecipe):
    """Scores in a few dimensions, by directions of the experts.

    Attributes:
        width: dimensions.
        temperature: of the softmax in the load-balance loss.

    Raises:
        InputError: width below 1, or temperature not above 0.
    """

    width: int = 8
    temperature: float = 0.3

    def __post_init__(self) -> None:
        whole("xmoe", "width", self.width, least=1)
        positive("xmoe", temperature=self.temperature)

    @override
    def build(self, sizes: RouterSizes) -> RouterParts:
        made = CosineScores(sizes.dim, sizes.experts, self.width, temperature=self.temperature)
        return RouterParts(scores=made)


@dataclass(frozen=True)
class DropoutRouter(RouterRecipe):
    """A random router that stays as it was drawn; more and more experts run as training goes on.

    A training loop tells how far it is by `foveate.nn.advance(model, share)`.
    """

    @override
    def build(self, sizes: RouterSizes) -> RouterParts:
        return RouterParts(scores=FrozenScores(sizes.dim, sizes.experts))


@dataclass(frozen=True)
class StableMoE(RouterRecipe):
    """Learns whom to choose in the first part of the training, and keeps to it afterwards.

    The choice then follows from a token's id alone. A training loop tells how far it is by
    `foveate.nn.advance(model, share)`.

    Attributes:
        first: share of the training in which the choice is learnt.
        width: of the embedding that chooses.

    Raises:
        InputError: first isn't a share, or width below 1.
    """

    first: float = 0.1
    width: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.first <= 1:
            raise InputError(f"stable-moe(first={self.first!r}): expected a share from 0 to 1.")
        whole("stable-moe", "width", self.width, least=1)

    @override
    def build(self, sizes: RouterSizes) -> RouterParts:
        made = StableScores(sizes.dim, sizes.experts, sizes.vocab, self.width, self.first)
        return RouterParts(scores=made)
