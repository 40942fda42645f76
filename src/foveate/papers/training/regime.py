"""How a model is trained: steps, batch, learning rate and its schedule, in one plain object."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foveate.ops.errors import InputError


@dataclass(frozen=True)
class Regime:
    """AdamW with linear warm-up, cosine decay and a limit on the gradient's norm.

    Two models that are compared get the same regime: the same number of steps and of tokens, the
    same data in the same order.

    Attributes:
        steps: of the optimizer.
        batch: sequences in each.
        lr: the highest learning rate.
        warmup: share of the steps in which the rate rises linearly to `lr`.
        floor: share of `lr` to which the cosine falls.
        weight_decay: of matrices and larger; vectors (gains, biases) have none.
        betas: of AdamW.
        clip: the gradient's norm is scaled down to this; 0 leaves it.
        every: steps between evaluations on the validation split, and between checkpoints.
        patience: evaluations in a row without a better loss after which it stops; the best weights
            are then put back. None never stops.
        seed: of the order of the data and of dropout (initialisation is the caller's).

    Raises:
        InputError: a number is out of its range.
    """

    steps: int = 500
    batch: int = 16
    lr: float = 2e-3
    warmup: float = 0.05
    floor: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    every: int = 100
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr must be above 0, such as 0.002; got {self.lr}.")
        for name in ("warmup", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share from 0 to 1, got {getattr(self, name)}.")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must lie in [0, 1), got {self.betas}.")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience must be 1 or more, or None; got {self.patience}.")

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self) | {"betas": list(self.betas)}


def optimizer_of(model: nn.Module, regime: Regime) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained, in two groups: with and without decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError("The model has no parameter that is trained.")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": regime.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=regime.lr, betas=regime.betas)


def schedule_of(
    optimizer: torch.optim.Optimizer, regime: Regime
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then a cosine down to `floor * lr` at the last step."""
    warmup = round(regime.warmup * regime.steps)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=max(1, regime.steps - 1 - warmup), eta_min=regime.floor * regime.lr
    )
    if not warmup:
        return fall
    rise = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1 / (warmup + 1), total_iters=warmup
    )
    with warnings.catch_warnings():
        # torch's own class steps its parts in a way that torch warns about.
        warnings.simplefilter("ignore")
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])
