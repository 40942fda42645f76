"""What can go wrong in a training."""

from __future__ import annotations

from foveate.ops.errors import FoveateError


class DivergedError(FoveateError, ArithmeticError):
    """A training's loss is no finite number any more."""


class CheckpointError(FoveateError, RuntimeError):
    """A folder's checkpoints are of another training."""
