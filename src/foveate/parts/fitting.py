"""Fitting: what a method learns or searches on a frozen model, and how it asks for it.

A method that has something to learn names a function in its class attribute `fitter`,

    fit(method, model, batches, progress, state) -> Artefact

and has `needs_fit` and `with_artefact`. The function sees the model through `Frozen` alone, so it
knows no library's models. It is called again with the `state` of a run that was cut off.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from foveate.ops.errors import InputError
from foveate.parts.attention import Attention


@dataclass(frozen=True)
class Artefact:
    """What a fit made.

    Attributes:
        key: of the method.
        facts: JSON data: sizes, settings, and figures of how well it went.
        tensors: weights by name, on the CPU; empty where JSON says all.
        built: what methods made of it, so that the layers of a model share it.
    """

    key: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    built: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


class Batch(NamedTuple):
    """Real text, and what of it counts.

    ids: (B, L) int64.
    scored: (B, L) bool, True at tokens whose prediction counts in a loss.
    task: "retrieval" (something far back must be found) or "prose" for each sequence.
    prompt: for each sequence the tokens of its prompt; what follows is the answer.
    """

    ids: Tensor
    scored: Tensor
    task: tuple[str, ...]
    prompt: tuple[int, ...]


class Batches(Protocol):
    """Text to fit on: batch number i is always the same; `held_out` is other text."""

    def train(self, number: int) -> Batch:
        """Batch `number` of the training text, for ever."""

    def held_out(self) -> Sequence[Batch]:
        """The batches that judge."""

    def describe(self) -> str:
        """What the text is, in a line with its digest."""


class Frozen(Protocol):
    """A model whose weights don't change.

    layers: numbers of the layers that attend, in order; an attention finds its own in `ctx.layer`.
    head_dim: of queries and keys; kv_heads: number of key/value heads.
    """

    layers: tuple[int, ...]
    head_dim: int
    kv_heads: int
    fingerprint: str

    def run(self, ids: Tensor, attention: Attention) -> Tensor:
        """The forward with this attention in every layer: hidden states (B, L, dim)."""

    def loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Mean cross entropy over the scored tokens of each sequence: (B,)."""


class State(Protocol):
    """What a fit keeps so that it goes on after a kill."""

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The facts and tensors that were saved last; None without."""

    def save(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep these, whole or not at all."""


Progress = Callable[[float, str], None]
Fitter = Callable[[Any, Frozen, Batches, Progress, State], Artefact]


@runtime_checkable
class Fittable(Protocol):
    """A method with something to learn."""

    fitter: str

    @property
    def needs_fit(self) -> bool:
        """Whether it can't run before an artefact is given."""

    def with_artefact(self, artefact: Artefact) -> Any:
        """The same method with what was learnt."""


def fitter_of(method: Any) -> Fitter:
    """The function that fits a method.

    Raises:
        InputError: it has nothing to learn.
    """
    if not isinstance(method, Fittable):
        raise InputError(
            f"{type(method).__name__} learns nothing on a frozen model; use it as it is."
        )
    module, _, name = method.fitter.rpartition(".")
    found: Fitter = getattr(importlib.import_module(module), name)
    return found


def missing(key: str, what: str, instead: str = "") -> str:
    """What to say of a method without its artefact."""
    other = f", or run {instead}, which needs none" if instead else ""
    return (
        f"{key} needs its {what}, which is learnt once for a model: foveate fit MODEL --method "
        f"{key}. Then foveate.use(model, {key!r}) finds it{other}."
    )
