"""What can go wrong in a training, whichever job it's part of."""

from __future__ import annotations

from foveate.ops.errors import FoveateError


class DivergedError(FoveateError, ArithmeticError):
    """A training's loss, weight or figure is no finite number any more."""
