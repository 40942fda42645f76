"""The one training loop: for miniatures, baselines and methods alike, and for `foveate train`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from foveate.papers.tasks.base import Batch, Task, generator
from foveate.papers.training.checkpoint import Checkpoints
from foveate.papers.training.errors import DivergedError
from foveate.papers.training.objective import BySegments, evaluate, next_token
from foveate.papers.training.regime import Regime, optimizer_of, schedule_of
from foveate.parts.routing import advance
from foveate.parts.weights import put_weights, weights
from foveate.runs.records import digest

Objective = Callable[[nn.Module, Batch], Tensor]
Watch = Callable[[nn.Module, int], dict[str, float]]


@dataclass
class Trained:
    """What a training did; the model itself was trained in place.

    Attributes:
        steps: that were made in all, earlier runs included.
        best: the lowest validation loss, in nats per scored token, and `best_step` where.
        stopped_early: by the regime's patience; the model holds the best weights then.
        history: an entry for each evaluation: step, lr, train (mean loss since the last one),
            validation, accuracy.
        seconds: of all steps and evaluations, earlier runs included.
        resumed_at: the step it went on from; 0 from the beginning.
        notes: on checkpoints that couldn't be read.
    """

    steps: int = 0
    best: float = math.inf
    best_step: int = 0
    stopped_early: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    resumed_at: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def curve(self) -> list[list[float]]:
        """Pairs of step and validation loss."""
        return [[entry["step"], entry["validation"]] for entry in self.history]


def train(
    model: nn.Module,
    task: Task,
    regime: Regime,
    *,
    objective: Objective = next_token,
    folder: Path | None = None,
    resume: bool = True,
    tell: Callable[[float, str], None] | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Train a model in place, on its own device.

    The batch of a step and its dropout depend on the regime's seed and the step alone, so a run
    that goes on from a checkpoint ends with exactly the weights of one that was never stopped.

    Args:
        model: returns logits (B, L, vocab), or an object with `.logits` (and `.aux`).
        task: batches.
        regime: how.
        objective: loss of a batch, a scalar; default cross entropy, plus the model's own losses.
            With `BySegments` the validation split is read in segments too.
        folder: of checkpoints, written at each evaluation; None keeps none.
        resume: go on from the folder's latest checkpoint; else these are removed.
        tell: takes the share that is done and a few words, at the start and after some steps.
        watch: called as watch(model, step) at each evaluation; its figures go into the history.

    Raises:
        DivergedError: the loss is no finite number any more.
        CheckpointError: the folder's checkpoints are of another training.
    """
    device = next(model.parameters()).device
    optimizer = optimizer_of(model, regime)
    schedule = schedule_of(optimizer, regime)
    kept = (
        None if folder is None else Checkpoints(folder, _identity(model, task, regime, objective))
    )
    segments = objective if isinstance(objective, BySegments) else None
    done = Trained()
    bad = 0
    if kept is not None and not resume:
        kept.clear()
    if kept is not None and (state := kept.load(model, optimizer)) is not None:
        done = Trained(**state["trained"])
        done.resumed_at = done.steps
        bad = state["bad"]
        schedule.load_state_dict(state["schedule"])
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr()):
            group["lr"] = rate
    if kept is not None:
        done.notes = kept.notes
    best = None if regime.patience is None else weights(model)
    if best is not None and kept is not None and done.best_step:
        best = kept.best()
    if tell is not None:
        tell(done.steps / regime.steps, f"goes on at step {done.steps}" if done.steps else "begins")
    started = perf_counter()
    before = done.seconds
    losses: list[float] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        while done.steps < regime.steps and not done.stopped_early:
            model.train()
            advance(model, done.steps / regime.steps)
            torch.manual_seed(generator("dropout", regime.seed, done.steps).initial_seed())
            batch = task.batch(regime.seed, done.steps, regime.batch).to(device)
            loss = objective(model, batch)
            losses.append(loss.item())
            _check_finite(losses[-1], "loss", done.steps, regime)
            rate = optimizer.param_groups[0]["lr"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if regime.clip:
                trained = [p for p in model.parameters() if p.grad is not None]
                torch.nn.utils.clip_grad_norm_(trained, regime.clip)
            optimizer.step()
            schedule.step()
            done.steps += 1
            if tell is not None and (done.steps % 5 == 0 or done.steps == regime.steps):
                tell(done.steps / regime.steps, f"step {done.steps}, loss {losses[-1]:.3f}")
            if done.steps % regime.every and done.steps < regime.steps:
                continue
            entry = _entry(model, task, regime, segments, done.steps, rate, losses)
            _check_finite(entry["validation"], "validation loss", done.steps, regime)
            advance(model, done.steps / regime.steps)
            done.history.append(entry if watch is None else entry | watch(model, done.steps))
            losses = []
            bad += 1
            if entry["validation"] < done.best:
                done.best, done.best_step, bad = entry["validation"], done.steps, 0
                if best is not None:
                    best = weights(model)
                    if kept is not None:
                        kept.save_best(model)
            done.stopped_early = regime.patience is not None and bad >= regime.patience
            done.seconds = before + perf_counter() - started
            if kept is not None:
                kept.save(done.steps, model, optimizer, _state(done, bad, schedule))
    if best is not None and done.best_step < done.steps:
        put_weights(model, best)
    model.eval()
    return done


def _check_finite(loss: float, name: str, step: int, regime: Regime) -> None:
    if not math.isfinite(loss):
        raise DivergedError(
            f"The {name} is {loss} at step {step}; take a learning rate below {regime.lr:g}, or "
            "more warm-up."
        )


def _entry(
    model: nn.Module,
    task: Task,
    regime: Regime,
    segments: BySegments | None,
    step: int,
    rate: float,
    losses: list[float],
) -> dict[str, float]:
    found = evaluate(model, task, "validation", regime.batch, segments=segments)
    return {
        "step": step,
        "lr": rate,
        "train": math.fsum(losses) / max(1, len(losses)),
        "validation": found["loss"],
        "accuracy": found["accuracy"],
    }


def _state(done: Trained, bad: int, schedule: Any) -> dict[str, Any]:
    trained = {name: getattr(done, name) for name in done.__dataclass_fields__}
    return {"trained": trained, "bad": bad, "schedule": schedule.state_dict()}


def _identity(model: nn.Module, task: Task, regime: Regime, objective: Objective) -> str:
    """Digest of what decides a training: what the model is made of, data and regime."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    made = {
        "model": repr(model),
        "shapes": shapes,
        "task": task.describe(),
        "regime": regime.as_dict(),
    }
    if isinstance(objective, BySegments):
        made["objective"] = repr(objective)
    return digest(made)
