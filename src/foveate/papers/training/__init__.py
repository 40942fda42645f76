"""A shared trainer: regime, loop, checkpoints, evaluation."""

from foveate.papers.training.errors import CheckpointError, DivergedError
from foveate.papers.training.loop import Trained, train
from foveate.papers.training.objective import evaluate, next_token
from foveate.papers.training.regime import Regime

__all__ = [
    "CheckpointError", "DivergedError", "Regime", "Trained", "evaluate", "next_token", "train",
]  # fmt: skip
