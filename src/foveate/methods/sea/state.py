"""What SEA keeps of the past: all keys and values, and beside them sums and a few rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from foveate.parts.cache import Field
from foveate.parts.kv_cache import TokenCache
from foveate.parts.state import State


class SeaState(State):
    """Keys and values grow by doubling; the rest is replaced in each step."""

    def __init__(self, fields: Sequence[Field]) -> None:
        super().__init__(fields)
        self.tokens = TokenCache(fields[:2])

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens' keys and values, and give back all."""
        held = self.tokens.append({"k": k, "v": v})
        return held["k"], held["v"]

    @override
    def bytes(self) -> int:
        return super().bytes() + self.tokens.bytes()

    @override
    def reset(self) -> None:
        super().reset()
        self.tokens.reset()

    @override
    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.tokens.reorder(rows)
