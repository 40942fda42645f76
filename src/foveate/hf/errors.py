"""What can go wrong between a transformers model and foveate."""

from __future__ import annotations

from foveate.ops.errors import FoveateError, InputError


class ModelError(FoveateError, ValueError):
    """This model, or this call of it, can't run through foveate."""


class InUseError(FoveateError, RuntimeError):
    """The model already runs through foveate."""


class AssignmentError(InputError):
    """An assignment of patterns names layers or heads that the model doesn't have."""
