"""Errors that say what was wrong, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FoveateError(Exception):
    """Base of every error that foveate raises on purpose."""


class InputError(FoveateError, ValueError):
    """An argument has the wrong shape, type or value."""


class UnknownMethodError(InputError, LookupError):
    """No method has this key."""


class BackendError(FoveateError, RuntimeError):
    """No backend, or not the one that was asked for, can run this call."""


class MissingPackageError(FoveateError, ImportError):
    """An optional package is needed for what was asked."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Names close to `name`, as the tail of an error message."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    return f"known are {', '.join(known)}."
