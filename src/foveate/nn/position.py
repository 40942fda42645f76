"""Which rotary positions a layer uses, and their tables, made once for all layers of a forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.ops.errors import InputError, nearest
from foveate.parts.projection import Projection
from foveate.parts.rope import Rope, rotate

POSITIONS = ("rope", "none")


def rope_for(
    position: str | Rope | None, projection: Projection, theta: float, interleaved: bool | None
) -> Rope | None:
    """The rotary positions of a layer, or None for a layer without any.

    Raises:
        InputError: an unknown name, or angles that don't fit the dimensions that turn.
    """
    if position is None or position == "none" or not projection.rope_dim:
        return None
    if isinstance(position, Rope):
        if 2 * len(position.inv_freq) > projection.rope_dim:
            raise InputError(
                f"Attention(position=Rope): it turns {2 * len(position.inv_freq)} dimensions, but "
                f"{type(projection).__name__} has {projection.rope_dim} that may turn."
            )
        return position
    if position != "rope":
        raise InputError(
            f"Attention(position={position!r}) is unknown; {nearest(str(position), POSITIONS)}"
        )
    pairs = projection.interleaved if interleaved is None else interleaved
    return Rope.of(projection.rope_dim, theta, interleaved=pairs)


def turned(rope: Rope, x: Tensor, positions: Tensor, store: dict[Any, Any]) -> Tensor:
    """Rotate x (B, H, L, R) to positions (L,) or (B, L); tables are kept in `store`."""
    kept = store.setdefault((turned, rope), [])
    tables = next((tables for known, tables in kept if known is positions), None)
    if tables is None:
        cos, sin = rope.tables(positions)
        tables = (cos * rope.scaling, sin * rope.scaling)
        kept.append((positions, tables))
    return rotate(x, *tables, interleaved=rope.interleaved)
