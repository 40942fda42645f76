"""Which rotary positions a layer uses, and their tables, made once for all layers of a forward."""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from foveate.ops.errors import InputError, nearest
from foveate.parts.rope import Rope, rotate

POSITIONS = ("rope", "none")
_HELD: WeakKeyDictionary[Rope, dict[Any, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


class Turning(Protocol):
    """A projection or a mixer: how many dimensions turn, and how they pair by default."""

    @property
    def rope_dim(self) -> int:
        """0 for none."""

    @property
    def interleaved(self) -> bool:
        """Whether pairs are neighbours."""


def rope_for(
    position: str | Rope | None, projection: Turning, theta: float, interleaved: bool | None
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
    if projection.rope_dim % 2:
        raise InputError(
            "Attention(position='rope'): dimensions turn in pairs, and those of "
            f"{type(projection).__name__} are {projection.rope_dim}; give an even head_dim, or "
            "position='none'."
        )
    if not theta > 0:
        raise InputError(f"Attention(theta={theta!r}): expected more than 0, such as 10_000.")
    pairs = projection.interleaved if interleaved is None else interleaved
    return Rope.of(projection.rope_dim, theta, interleaved=pairs)


def turned(rope: Rope, x: Tensor, positions: Tensor, store: dict[Any, Any]) -> Tensor:
    """Rotate x (B, H, L, R) to positions (L,) or (B, L); tables are kept in `store`.

    Angles are formed in float64; the rotation runs in fp32, or x's dtype if that is wider.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    kept = store.setdefault((turned, rope, work), [])
    tables = next((tables for known, tables in kept if known is positions), None)
    if tables is None:
        first = store.get((counted, id(positions)))
        if first == 0:
            tables = _from_start(rope, len(positions), positions.device, work)
        else:
            tables = _tables(rope, positions, work)
        kept.append((positions, tables))
    return rotate(x, *tables, interleaved=rope.interleaved)


def counted(store: dict[Any, Any], start: int, stop: int, device: torch.device) -> Tensor:
    """Positions start ... stop - 1, one tensor for all layers of a forward: so are its tables."""
    kept = store.setdefault((counted, start, stop, device), [])
    if not kept:
        kept.append(torch.arange(start, stop, device=device))
        store[counted, id(kept[0])] = start
    return kept[0]


def _tables(rope: Rope, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = rope.tables(positions)
    return (cos * rope.scaling).to(dtype), (sin * rope.scaling).to(dtype)


def _from_start(
    rope: Rope, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Tables of positions 0 ... length - 1, out of longer ones that outlive the forward.

    A cache that is rotated when it is read needs them anew at every step.
    """
    if torch.compiler.is_compiling():
        return _tables(rope, torch.arange(length, device=device), dtype)
    held = _HELD.setdefault(rope, {})
    tables = held.get((device, dtype))
    if tables is None or len(tables[0]) < length:
        room = max(length, 2 * len(tables[0]) if tables is not None else 0)
        with torch.inference_mode(False), torch.no_grad():
            tables = held[device, dtype] = _tables(rope, torch.arange(room, device=device), dtype)
    return tables[0][:length], tables[1][:length]
