"""A state that keeps an entry of every token, as a projection's cache does."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from foveate.parts.cache import Field
from foveate.parts.kv_cache import Entries, TokenCache
from foveate.parts.state import State


class TokenState(State):
    """Entries of all tokens by field, which can be cut back to any length.

    Args:
        fields: each (heads, width) for every token; see `foveate.parts.kv_cache.token_field`.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        super().__init__(fields)
        self._tokens = TokenCache(fields)

    @property
    def entries(self) -> Entries:
        """Field name -> (B, heads, len, width); empty before the first tokens."""
        return self._tokens.entries

    def append(self, entries: Entries) -> Entries:
        """Take in new tokens and give back all that is held; see `TokenCache.append`."""
        found = self._tokens.append(entries)
        self._follow()
        return found

    @override
    def reset(self) -> None:
        self._tokens.reset()
        self._follow()

    @override
    def reorder(self, rows: Tensor) -> None:
        self._tokens.reorder(rows)
        self._follow()

    @override
    def truncate(self, length: int) -> None:
        self._tokens.truncate(length)
        self._follow()

    def _follow(self) -> None:
        self.length, self.held = len(self._tokens), self._tokens.entries
