"""What can go wrong in a training of the one loop."""

from __future__ import annotations

from foveate.ops.errors import FoveateError
from foveate.runs.errors import DivergedError

__all__ = ["CheckpointError", "DivergedError"]


class CheckpointError(FoveateError, RuntimeError):
    """A folder's checkpoints are of another training."""
