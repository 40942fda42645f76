"""The Routing Transformer's hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from foveate.methods.routing_transformer.centroids import INITS, UPDATES
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole
from foveate.parts.attention import AttentionRecipe, Heads

if TYPE_CHECKING:
    from foveate.methods.routing_transformer.layer import RoutingAttention

FORMS = ("auto", "sequence", "prefix")
ASSIGNMENTS = ("nearest", "random")


@dataclass(frozen=True)
class RoutingTransformer(AttentionRecipe):
    """Local heads beside heads that attend within clusters; arXiv 2003.05997, section 4.

    A routing head normalises queries and keys, gives each of its C centroids the w tokens nearest
    to it, lets queries attend to the keys of their own clusters, and averages what a query gets
    from several. With w = n / C and C about sqrt(n) that costs n^1.5 D.

    A layer in training adds `commitment_loss` to `ctx.aux` and moves its centroids. The mask must
    be causal or none (padding aside). The heads that route have no log-sum-exp.

    Attributes:
        clusters: C, centroids of each key/value head.
        window: w, members of a cluster; None is n / C, for calls on whole sequences.
        local: query heads, the first ones, that attend to their own and the neighbouring block;
            None is half of them, in whole groups of query heads.
        block: tokens of a local head's block.
        skip_first: layers, from the first, in which all heads are local.
        shared: whether keys are the queries, and the keys that come in aren't looked at; None is
            the paper's choice: shared if causal, separate if not.
        own: whether a query may see its own key; False leaves it to queries that have no other, as
            a shared key always outweighs the others; None is False where keys are shared.
        form: "sequence" takes a cluster's members from the whole sequence, as the paper trains, so
            that a later token may push out an earlier one; "prefix" from the tokens up to each
            query, as decoding does; "auto" is "sequence" in training and "prefix" otherwise.
        scale: factor on the scores of the routing heads; None is the model's, else D ** -0.5. The
            released code has none, 1.0.
        eps: added to the number of clusters that a query's outputs are averaged over (released
            code: 1e-2).
        decay: lambda of the centroids' moving average.
        beta: weight of the commitment loss.
        update: how centroids learn: "ema", "sum", "spherical", "gradient" or "none"; see
            `foveate.methods.routing_transformer.centroids.Centroids`.
        init: how they begin: "normal", "data" or "hash".
        assignment: "nearest", or "random" members, the paper's Random Transformer.
        relative: R, learnt embeddings of distances 0 ... R - 1 on keys and values, of the slots
            inside a cluster; 0 is none. Causal with shared keys; scores of each cluster are then
            held as a whole, w x w.
        memory: learnt keys and values that each cluster has beside its members (lucidrains: 1).
        micro_batches: training calls of one optimiser step.

    Raises:
        InputError: a value that doesn't fit.
    """

    clusters: int = 16
    window: int | None = 512
    local: int | None = None
    block: int = 256
    skip_first: int = 0
    shared: bool | None = None
    own: bool | None = None
    form: str = "auto"
    scale: float | None = None
    eps: float = 1e-5
    decay: float = 0.999
    beta: float = 1e-4
    update: str = "ema"
    init: str = "normal"
    assignment: str = "nearest"
    relative: int = 0
    memory: int = 0
    micro_batches: int = 1

    def __post_init__(self) -> None:
        name = "routing-transformer"
        for field in ("clusters", "block", "micro_batches"):
            whole(name, field, getattr(self, field), least=1)
        for field in ("skip_first", "relative", "memory"):
            whole(name, field, getattr(self, field), least=0)
        if self.window is not None:
            whole(name, "window", self.window, least=1)
        if self.local is not None:
            whole(name, "local", self.local, least=0)
        for field, known in (
            ("form", FORMS),
            ("update", UPDATES),
            ("init", INITS),
            ("assignment", ASSIGNMENTS),
        ):
            value = getattr(self, field)
            if value not in known:
                raise InputError(
                    f"{name}({field}={value!r}) is unknown; {nearest(str(value), known)}"
                )
        for field in ("shared", "own"):
            if getattr(self, field) not in (None, True, False):
                raise InputError(
                    f"{name}({field}={getattr(self, field)!r}): expected True, False or None."
                )
        if not (0 <= self.decay < 1):
            raise InputError(f"{name}(decay={self.decay!r}): expected 0 up to, not with, 1.")
        for field in ("eps", "beta"):
            if not getattr(self, field) >= 0:
                raise InputError(
                    f"{name}({field}={getattr(self, field)!r}): expected a number of at least 0."
                )
        if self.window is None and self.form == "prefix":
            raise InputError(
                f"{name}(window=None, form='prefix'): members of a prefix need a number that "
                "doesn't grow with it; give window=, such as the usual length over the clusters."
            )
        if self.relative and (self.shared is False or self.memory):
            raise InputError(
                f"{name}(relative={self.relative}): distances inside a cluster are defined where "
                "keys are the queries and there is no memory; expected shared=True and memory=0."
            )
        if self.micro_batches > 1 and self.update in ("gradient", "none"):
            raise InputError(
                f"{name}(micro_batches={self.micro_batches}, update={self.update!r}): only moving "
                "averages wait for the last of them; leave micro_batches out."
            )

    @override
    def build(self, heads: Heads) -> RoutingAttention:
        """The attention of a layer; see `RoutingAttention`."""
        from foveate.methods.routing_transformer.layer import RoutingAttention

        return RoutingAttention(self, heads)
