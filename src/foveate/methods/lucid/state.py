"""What LUCID keeps while decoding: keys as attention sees them, and y in place of v."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from foveate.parts.attention import Heads
from foveate.parts.kv_cache import token_field
from foveate.parts.state import State
from foveate.parts.token_state import TokenState


class LucidState(TokenState):
    """Fields k (not normalised) and y of every token; and the inner attention's own state, if any.

    A truncation takes tokens back exactly. Dropping tokens from the front would not be exact: y of
    all later ones holds them.

    Args:
        heads: sizes of the layer.
        inner: an empty state of the inner attention, if it keeps one.
    """

    def __init__(self, heads: Heads, inner: State | None = None) -> None:
        fields = (
            token_field("k", heads.kv, heads.key_dim),
            token_field("y", heads.kv, heads.value_dim),
        )
        super().__init__(fields)
        self.inner = inner
        if inner is not None:
            self.fields = (*fields, *(f._replace(name=f"inner.{f.name}") for f in inner.fields))

    @override
    def bytes(self) -> int:
        return super().bytes() + (self.inner.bytes() if self.inner is not None else 0)

    @override
    def reset(self) -> None:
        super().reset()
        if self.inner is not None:
            self.inner.reset()

    @override
    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        if self.inner is not None:
            self.inner.reorder(rows)

    @override
    def truncate(self, length: int) -> None:
        if self.inner is not None:  # the one that may refuse goes first
            self.inner.truncate(length)
        super().truncate(length)
