"""Training a diffusion transformer on clips, from where it stopped; see `models.denoise`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from foveate.models.denoise import denoising_loss
from foveate.papers.training.checkpoint import Checkpoints
from foveate.papers.training.errors import DivergedError
from foveate.papers.training.regime import Regime, optimizer_of, schedule_of
from foveate.runs.clips import Clips
from foveate.runs.records import digest


def fit(
    model: nn.Module,
    clips: Clips,
    regime: Regime,
    *,
    folder: Path | None = None,
    tell: Callable[[float, str], None] | None = None,
) -> list[list[float]]:
    """Train in place; pairs of step and validation error, at each of the regime's evaluations.

    The batch of a step depends on the regime's seed and the step alone, so a training that goes on
    from a checkpoint in `folder` ends as one that was never stopped.

    Args:
        model: takes (x_t, 1000 t), such as `DiT`.
        clips: data.
        regime: how.
        folder: of checkpoints; None keeps none.
        tell: takes the share that is done and a few words.

    Raises:
        DivergedError: the loss is no finite number any more.
        CheckpointError: the folder's checkpoints are of another training.
    """
    optimizer = optimizer_of(model, regime)
    schedule = schedule_of(optimizer, regime)
    device = next(model.parameters()).device
    kept = None if folder is None else Checkpoints(folder, _identity(model, clips, regime))
    curve: list[list[float]] = []
    step = 0
    if kept is not None and (state := kept.load(model, optimizer)) is not None:
        step, curve = state["step"], state["curve"]
        schedule.load_state_dict(state["schedule"])
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr()):
            group["lr"] = rate
    model.train()
    while step < regime.steps:
        batch = (x.to(device) for x in clips.training(regime.batch, regime.seed, step))
        loss = denoising_loss(model, *batch)
        if not math.isfinite(loss.item()):
            raise DivergedError(
                f"The loss is {loss.item()} at step {step}; take a learning rate below "
                f"{regime.lr:g}, or more warm-up."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if regime.clip:
            nn.utils.clip_grad_norm_(model.parameters(), regime.clip)
        optimizer.step()
        schedule.step()
        step += 1
        if tell is not None and step % 10 == 0:
            tell(step / regime.steps, f"step {step}, error {loss.item():.3f}")
        if step % regime.every == 0 or step == regime.steps:
            curve.append([step, error(model, clips, 16, "validation")])
            if kept is not None:
                kept.save(
                    step, model, optimizer, {"curve": curve, "schedule": schedule.state_dict()}
                )
    model.eval()
    return curve


@torch.no_grad()
def error(
    model: nn.Module, clips: Clips, count: int, split: str = "test", batch: int = 16
) -> float:
    """Mean squared error of the predicted x_0 on held-out clips, the same ones for everybody."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    held: list[Tensor] = [x.to(device) for x in clips.held_out(count, split)]
    for some in zip(*(x.split(batch) for x in held)):
        total += denoising_loss(model, *some).item() * len(some[0])
    model.train(was_training)
    return total / count


def _identity(model: nn.Module, clips: Clips, regime: Regime) -> str:
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    return digest(
        {
            "model": repr(model),
            "shapes": shapes,
            "clips": clips.describe(),
            "regime": regime.as_dict(),
        }
    )
