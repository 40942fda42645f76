"""The name under which transformers finds us, as long as some config points at it.

A config in use holds a `Pointer`: to transformers the name, and beside it what the config said
before. A deep copy of a model copies its config, and with it the pointer; so copies are known, the
name stays registered while they live (they get an error that says what to do, not a KeyError), and
a pickled model remembers nothing of us.
"""

from __future__ import annotations

import weakref
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from foveate.hf.attend import HELD, attend
from foveate.hf.masks import make_mask

NAME = "foveate_attention"
_COPIES: set[int] = set()


class Pointer(str):
    """Our name; `before` is what the config said before it."""

    before: str | None

    def __new__(cls, before: str | None) -> Pointer:
        """A pointer in place of `before`."""
        made = super().__new__(cls, NAME)
        made.before = before
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Pointer:
        copy = Pointer(self.before)
        _COPIES.add(id(copy))
        weakref.finalize(copy, _forget, id(copy)).atexit = False
        return copy

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (_plain, (self.before,)) if self.before is None else (str, (self.before,))


def _plain(value: None) -> None:
    return value


def _forget(copy: int) -> None:
    _COPIES.discard(copy)
    release()


def register() -> None:
    """Tell transformers of us."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def release() -> None:
    """Take the name back if no config points at it any more."""
    if not HELD and not _COPIES:
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop(NAME, None)
