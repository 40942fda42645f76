"""And, or and not of masks, element by element and on whole tiles.

The expression of a combination is put together from its parts', with the parts' tensors renumbered.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from foveate.ops.errors import InputError
from foveate.ops.masks.base import Certainty, Mask


def _renumber(spec: str, count: int, start: int) -> str:
    """Shift the tensor names $0$, $1$, ... of an expression so that they begin at `start`."""
    if start:
        for i in reversed(range(count)):
            spec = spec.replace(f"${i}$", f"${i + start}$")
    return spec


class _Chain(Mask):
    """Several masks under one sign; a chain of chains of the same sign is one chain."""

    __slots__ = ("_groups", "parts")
    sign = ""

    def __init__(self, left: Mask, right: Mask) -> None:
        same = type(self)
        head, tail = (x.parts if isinstance(x, same) else (x,) for x in (left, right))
        self.parts: tuple[Mask, ...] = (*head, *tail)
        self._groups = _common(left.groups(), right.groups())
        specs = (left.spec, _renumber(right.spec, len(right.tensors), len(left.tensors)))
        one, two = (
            spec[1:-1] if isinstance(x, same) else spec for spec, x in zip(specs, (left, right))
        )
        super().__init__(f"({one} {self.sign} {two})", left.tensors + right.tensors)

    @override
    def groups(self) -> tuple[int, int]:
        return self._groups

    def _check(self, q_len: int, kv_len: int) -> None:
        for part in self.parts:
            part._check(q_len, kv_len)

    def _alike(
        self, q: Tensor, k: Tensor, tile: tuple[int, int], b: int, h: int
    ) -> tuple[Tensor, ...] | None:
        all_parts: tuple[Tensor, ...] = ()
        for part in self.parts:
            alike = part._alike(q, k, tile, b, h)
            if alike is None:
                return None
            all_parts += alike
        return all_parts


def _common(one: tuple[int, int], two: tuple[int, int]) -> tuple[int, int]:
    for what, a, b in zip(("batch entries", "heads"), one, two):
        if a != b and 1 not in (a, b):
            raise InputError(
                f"Masks that differ over {a} and over {b} {what} can't be combined; "
                "make them for the same number, or for 1."
            )
    return max(one[0], two[0]), max(one[1], two[1])


class And(_Chain):
    """Visible in all."""

    __slots__ = ()
    sign = "&"

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        seen = self.parts[0]._element(q, k, b, h)
        for part in self.parts[1:]:
            seen = seen & part._element(q, k, b, h)
        return seen

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        none, full = self.parts[0]._tiles(q_lo, q_hi, k_lo, k_hi, b, h)
        for part in self.parts[1:]:
            more = part._tiles(q_lo, q_hi, k_lo, k_hi, b, h)
            none, full = none | more.none, full & more.full
        return Certainty(none, full)


class Or(_Chain):
    """Visible in any."""

    __slots__ = ()
    sign = "|"

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        seen = self.parts[0]._element(q, k, b, h)
        for part in self.parts[1:]:
            seen = seen | part._element(q, k, b, h)
        return seen

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        none, full = self.parts[0]._tiles(q_lo, q_hi, k_lo, k_hi, b, h)
        for part in self.parts[1:]:
            more = part._tiles(q_lo, q_hi, k_lo, k_hi, b, h)
            none, full = none & more.none, full | more.full
        return Certainty(none, full)


class Not(Mask):
    """Visible where the other is not."""

    __slots__ = ("inner",)

    def __init__(self, inner: Mask) -> None:
        super().__init__(f"~{inner.spec}", inner.tensors)
        self.inner = inner

    @override
    def groups(self) -> tuple[int, int]:
        return self.inner.groups()

    def _check(self, q_len: int, kv_len: int) -> None:
        self.inner._check(q_len, kv_len)

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        return ~self.inner._element(q, k, b, h)

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        inner = self.inner._tiles(q_lo, q_hi, k_lo, k_hi, b, h)
        return Certainty(inner.full, inner.none)

    def _alike(
        self, q: Tensor, k: Tensor, tile: tuple[int, int], b: int, h: int
    ) -> tuple[Tensor, ...] | None:
        return self.inner._alike(q, k, tile, b, h)
