"""A mask: who may attend to whom, from positions alone.

A mask answers three questions, and everything else follows from them:

- `_element(q, k, b, h)`: for positions q and k (integer tensors that broadcast), may q see k?
- `_tiles(q_lo, q_hi, k_lo, k_hi, b, h)`: for boxes of positions, inclusive on both ends, is surely
  nothing, or surely everything, visible? The answer may be "don't know"; it must never be wrong,
  whichever subset of the box the real positions are (they need not be contiguous).
- `groups()`: over how many batch entries and heads does it differ?

A fourth answer, `_alike`, is for speed alone: which tiles look the same.

True means attend. Queries are aligned to the end of the keys: without explicit positions, query i
of Lq stands at position Lkv - Lq + i.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from foveate.ops.errors import InputError

if TYPE_CHECKING:
    from foveate.ops.layout import Layout


class Certainty(NamedTuple):
    """What interval reasoning knows of a tile: `none` visible for sure, `full` visible for sure."""

    none: Tensor
    full: Tensor


class Mask:
    """Base of all masks; combine with `&`, `|`, `~`. `repr(mask)` is its expression."""

    __slots__ = ("_tensors", "spec")

    spec: str
    _tensors: tuple[Tensor, ...]

    def __init__(self, spec: str, tensors: tuple[Tensor, ...] = ()) -> None:
        self.spec = spec
        self._tensors = tensors

    # -- what a mask must answer ------------------------------------------------------------
    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        raise TypeError(f"{type(self).__name__} is not a mask: it defines no _element")

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        raise TypeError(f"{type(self).__name__} is not a mask: it defines no _tiles")

    def _alike(
        self, q: Tensor, k: Tensor, tile: tuple[int, int], b: int, h: int
    ) -> tuple[Tensor, ...] | None:
        """What decides how a tile of consecutive positions looks, from its first q and first k.

        Tiles of equal size that agree in all of these integers look the same, so that one of
        them speaks for all. None: nothing is known, look at each.
        """
        return None

    def groups(self) -> tuple[int, int]:
        """(batch entries, heads) over which the mask differs; 1 where it is shared."""
        return (1, 1)

    def _check(self, q_len: int, kv_len: int) -> None:
        """Refuse lengths that this mask was not made for."""

    # -- what everyone uses -------------------------------------------------------------------
    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the expression names, in order (t0, t1, ...)."""
        return self._tensors

    def __and__(self, other: Mask) -> Mask:
        from foveate.ops.masks.algebra import And

        return And(self, _as_mask(other, "&"))

    def __or__(self, other: Mask) -> Mask:
        from foveate.ops.masks.algebra import Or

        return Or(self, _as_mask(other, "|"))

    def __invert__(self) -> Mask:
        from foveate.ops.masks.algebra import Not

        return Not(self)

    def __repr__(self) -> str:
        spec = self.spec
        for i, tensor in enumerate(self._tensors):
            spec = spec.replace(f"${i}$", f"<{tuple(tensor.shape)}>")
        return spec

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return (
            self.spec == other.spec
            and len(self._tensors) == len(other._tensors)
            and all(a is b or torch.equal(a, b) for a, b in zip(self._tensors, other._tensors))
        )

    def __hash__(self) -> int:
        return hash((self.spec, tuple(tuple(t.shape) for t in self._tensors)))

    def dense(
        self,
        q_len: int,
        kv_len: int,
        *,
        q_positions: Tensor | None = None,
        kv_positions: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The mask element by element: bool (Bm, Hm, q_len, kv_len), Bm and Hm 1 where shared."""
        q_pos, k_pos = positions(q_len, kv_len, q_positions, kv_positions, device)
        self._check(q_len, kv_len)
        batches, heads = self.groups()
        batches = max(batches, q_pos.shape[0], k_pos.shape[0])
        rows = []
        for b in range(batches):
            q = q_pos[b if q_pos.shape[0] > 1 else 0][:, None]
            k = k_pos[b if k_pos.shape[0] > 1 else 0][None, :]
            planes = [self._element(q, k, b, h).expand(q_len, kv_len) for h in range(heads)]
            rows.append(torch.stack(planes))
        return torch.stack(rows)

    def layout(
        self,
        q_len: int,
        kv_len: int,
        tile: int | tuple[int, int] = 64,
        *,
        q_positions: Tensor | None = None,
        kv_positions: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Layout:
        """The tiles that this mask visits for the given lengths.

        Args:
            q_len: number of queries.
            kv_len: number of keys.
            tile: tile size, or (query tile, key tile); multiples of 8.
            q_positions: integer (Lq,) or (B, Lq); default kv_len - q_len + i.
            kv_positions: integer (Lkv,) or (B, Lkv); default 0 ... kv_len - 1.
            device: where the layout's tensors go; default that of the positions, else the CPU.

        Returns:
            A `Layout`; cached by (mask, lengths, tile, device) unless positions are given.
        """
        from foveate.ops.layout.build import layout_of_mask

        return layout_of_mask(self, q_len, kv_len, tile, q_positions, kv_positions, device)

    def _ordered(
        self, q_len: int, kv_len: int, tile: tuple[int, int], device: torch.device
    ) -> Layout | None:
        """A layout with the tokens in a better order, by row indices; None where there is none."""
        return None

    def pairs(self, q_len: int, kv_len: int) -> int:
        """Number of (query, key) pairs that may attend, for one batch entry and head.

        Where the mask differs by batch entry or head this is the sum over those that differ.
        """
        from foveate.ops.layout.build import layout_of_mask

        # (length / tile) ** 2 tiles are looked at, and length * tile pairs one by one.
        tile = max(64, (1 << max(q_len, kv_len).bit_length()) // 8192)
        layout = layout_of_mask(self, q_len, kv_len, tile, None, None, None)
        return int(layout.pairs_by_group().sum())


def _as_mask(other: object, sign: str) -> Mask:
    if not isinstance(other, Mask):
        raise InputError(
            f"`mask {sign} x` needs a mask on both sides, but x is {type(other).__name__}; "
            "wrap a boolean tensor as blocks(tensor, 1)."
        )
    return other


def positions(
    q_len: int,
    kv_len: int,
    q_positions: Tensor | None,
    kv_positions: Tensor | None,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys, each (1 or B, L) int64, defaults filled in and checked."""
    q_pos = _positions("q_positions", q_positions, q_len, kv_len - q_len, device)
    k_pos = _positions("kv_positions", kv_positions, kv_len, 0, device or q_pos.device)
    if device is None and q_pos.device != k_pos.device:
        q_pos = q_pos.to(k_pos.device)
    return q_pos, k_pos


def _positions(
    name: str, given: Tensor | None, length: int, start: int, device: torch.device | str | None
) -> Tensor:
    if given is None:
        return torch.arange(start, start + length, device=device or "cpu")[None]
    if given.is_floating_point() or given.dtype == torch.bool:
        raise InputError(f"{name} must be integers, got {given.dtype}.")
    if given.dim() not in (1, 2) or given.shape[-1] != length:
        raise InputError(
            f"{name} must have shape ({length},) or (B, {length}), got {tuple(given.shape)}."
        )
    given = given.to(device=device, dtype=torch.int64)
    return given[None] if given.dim() == 1 else given
