"""What a layer returns: its result, its cache, and losses and statistics by name."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class LayerOutput(NamedTuple):
    """The result of a layer.

    y: (B, L, dim); cache: the cache that was given, now with the new tokens, or None; aux: losses
    (names that end with "_loss", already weighted) and statistics.
    """

    y: Tensor
    cache: Any
    aux: dict[str, Tensor]
