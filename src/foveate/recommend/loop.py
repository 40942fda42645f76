"""Training by epochs, for every recommender alike: evaluate, keep the best, stop early, go on.

An epoch's draws (order, negatives, dropout) come from the seed and its number alone. All that is
needed to go on lies in one file, replaced as a whole after every evaluation, so that a training
that was killed ends with the same weights, bit by bit, as one that wasn't.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.weights import moments, put_moments, put_weights, weights
from foveate.runs.errors import DivergedError

KEY = "recommend"


@dataclass(frozen=True)
class Plan:
    """How long, and how often to look.

    Attributes:
        epochs: at most.
        every: epochs between evaluations, each of which may be gone on from.
        patience: evaluations in a row without a better figure after which it stops; None: never.
        seed: of order, negatives and dropout.

    Raises:
        InputError: a number below 1.
    """

    epochs: int = 100
    every: int = 5
    patience: int | None = 10
    seed: int = 0

    def __post_init__(self) -> None:
        whole("Plan", "epochs", self.epochs, least=1)
        whole("Plan", "every", self.every, least=1)
        if self.patience is not None:
            whole("Plan", "patience", self.patience, least=1)


class Trainee(Protocol):
    """What is trained."""

    @property
    def model(self) -> nn.Module:
        """Whose weights are learnt."""

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """All over (some of) the model's parameters."""

    def epoch(self, number: int, random: torch.Generator) -> dict[str, float]:
        """One epoch, all draws from `random` and torch's random state; mean losses."""

    def loaded(self, epochs: int) -> None:
        """Weights after so many epochs were put in: make anew what is derived from them."""

    def validate(self) -> float:
        """The figure on the validation part that decides; higher is better."""

    def setting(self) -> dict[str, Any]:
        """JSON data that decides the training, but for the plan."""


@dataclass
class Done:
    """A finished training; the model has the weights of its best epoch.

    Attributes:
        best: the best figure on the validation part, after `best_epoch` epochs.
        epochs: that were run in all.
        resumed_at: the epoch that it went on from; 0 from the start.
        seconds: of training and evaluation, earlier runs' included.
        history: by evaluation: epoch, losses, figure.
    """

    best: float = -math.inf
    best_epoch: int = 0
    epochs: int = 0
    resumed_at: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    trainee: Trainee,
    plan: Plan,
    path: Path | None = None,
    tell: Callable[[float, str], None] = lambda share, doing: None,
) -> Done:
    """Train to the end, from `path` if something lies there.

    Args:
        trainee: fresh.
        plan: of the training.
        path: of the file to go on from; None keeps nothing.
        tell: takes the share that is done and what is being done.

    Raises:
        InputError: `path` holds another training, or is damaged.
        DivergedError: a loss isn't finite.
    """
    setting = trainee.setting() | {"every": plan.every, "seed": plan.seed}
    done, best = Done(), weights(trainee.model)
    if path is not None and path.exists():
        done, best = _load(path, trainee, setting)
    begun, before = perf_counter(), done.seconds
    tell(done.epochs / plan.epochs, "")
    while done.epochs < plan.epochs and not _enough(done, plan):
        number = done.epochs
        figures = _epoch(trainee, plan, number)
        if not all(math.isfinite(value) for value in figures.values()):
            raise DivergedError(f"Epoch {number + 1} gave {figures}; take a lower learning rate.")
        done.epochs += 1
        last = done.epochs == plan.epochs
        said = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        if done.epochs % plan.every == 0 or last:
            figure = _validate(trainee)
            done.history.append({"epoch": done.epochs, "figure": figure} | figures)
            if figure > done.best:
                done.best, done.best_epoch, best = figure, done.epochs, weights(trainee.model)
            done.seconds = before + perf_counter() - begun
            if path is not None:
                _save(path, trainee, setting, done, best)
            said += f", validation {figure:.4f} (best {done.best:.4f})"
        tell(done.epochs / plan.epochs, f"epoch {done.epochs}: {said}")
    put_weights(trainee.model, best)
    trainee.loaded(done.best_epoch)
    trainee.model.eval()
    return done


def _epoch(trainee: Trainee, plan: Plan, number: int) -> dict[str, float]:
    random = torch.Generator().manual_seed(hash_of(plan.seed, number))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash_of(plan.seed, number, 1))
        trainee.model.train()
        return trainee.epoch(number, random)


def _validate(trainee: Trainee) -> float:
    # An epoch's losses are of the weights before its last step.
    if not all(bool(p.isfinite().all()) for p in trainee.model.parameters()):
        raise DivergedError("A weight is no finite number any more; take a lower learning rate.")
    trainee.model.eval()
    figure = trainee.validate()
    if not math.isfinite(figure):
        raise DivergedError(f"The validation figure is {figure}; take a lower learning rate.")
    return figure


def hash_of(*numbers: int) -> int:
    """A seed from several numbers, in which no two neighbours are alike."""
    made = 0x9E3779B97F4A7C15
    for number in numbers:
        made = ((made ^ (number + 1)) * 0xBF58476D1CE4E5B9) & (2**63 - 1)
        made ^= made >> 31
    return made


def _enough(done: Done, plan: Plan) -> bool:
    if plan.patience is None or not done.history:
        return False
    since = sum(1 for at in done.history if at["epoch"] > done.best_epoch)
    return since >= plan.patience


def _save(
    path: Path, trainee: Trainee, setting: dict[str, Any], done: Done, best: dict[str, Tensor]
) -> None:
    from foveate.hf.fit.artefacts import save
    from foveate.parts.fitting import Artefact

    tensors = {f"model/{n}": t for n, t in weights(trainee.model).items()}
    tensors |= {f"best/{n}": t for n, t in best.items()}
    for i, optimizer in enumerate(trainee.optimizers):
        held = moments(trainee.model, optimizer)
        tensors |= {f"optimizer{i}/{n}": t for n, t in held.items()}
    save(Artefact(KEY, {"setting": setting, "done": vars(done)}, tensors), "", path)


def _load(path: Path, trainee: Trainee, setting: dict[str, Any]) -> tuple[Done, dict[str, Tensor]]:
    from foveate.hf.fit.artefacts import ArtefactError, load

    try:
        held, _ = load(path)
    except ArtefactError as error:
        raise InputError(
            f"{path} is damaged and can't be gone on from; remove it to train anew."
        ) from error
    if held.key != KEY or held.facts["setting"] != setting:
        raise InputError(
            f"{path} is of another training (data, model or settings differ); give another --out, "
            "or remove it to train anew."
        )

    def below(prefix: str) -> dict[str, Tensor]:
        mark = f"{prefix}/"
        return {n.removeprefix(mark): t for n, t in held.tensors.items() if n.startswith(mark)}

    put_weights(trainee.model, below("model"))
    for i, optimizer in enumerate(trainee.optimizers):
        put_moments(trainee.model, optimizer, below(f"optimizer{i}"))
    done = Done(**held.facts["done"])
    done.resumed_at = done.epochs
    trainee.loaded(done.epochs)
    return done, below("best")
