"""The catalogue's masks (`foveate.parts.longcontext`) as cases to measure."""

from __future__ import annotations

from torch import Tensor

from foveate.bench.case import Case, from_layout, from_mask
from foveate.parts.longcontext.masks import (
    DYNAMIC,
    EVICTION,
    FIXED,
    KEPT,
    Settings,
    eviction_rows,
    names,
    random_eviction,
    settings,
)

__all__ = [
    "DYNAMIC", "EVICTION", "FIXED", "KEPT", "Settings", "make", "make_dynamic", "names", "settings",
]  # fmt: skip


def make(name: str, s: Settings) -> Case:
    """The case of a name in `FIXED`, or random eviction."""
    if name != EVICTION:
        return from_mask(name, s.length, FIXED[name](s))
    evicted = eviction_rows(s)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < evicted[k])

    return from_layout(name, s.length, lambda tile: random_eviction(s, tile), seen)


def make_dynamic(name: str, share: float, s: Settings) -> Case:
    """The case of a name in `DYNAMIC` with a share of blocks to keep."""
    return from_mask(f"{name}@{share:g}", s.length, DYNAMIC[name](s, share))
