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


class _Pair(Mask):
    __slots__ = ("left", "right")
    sign = ""

    def __init__(self, left: Mask, right: Mask) -> None:
        tail = _renumber(right.spec, len(right.tensors), len(left.tensors))
        super().__init__(f"({left.spec} {self.sign} {tail})", left.tensors + right.tensors)
        self.left, self.right = left, right
        self.groups()

    @override
    def groups(self) -> tuple[int, int]:
        (lb, lh), (rb, rh) = self.left.groups(), self.right.groups()
        for what, one, two in (("batch entries", lb, rb), ("heads", lh, rh)):
            if one != two and 1 not in (one, two):
                raise InputError(
                    f"Masks that differ over {one} and over {two} {what} can't be combined; "
                    "make them for the same number, or for 1."
                )
        return max(lb, rb), max(lh, rh)

    def _check(self, q_len: int, kv_len: int) -> None:
        self.left._check(q_len, kv_len)
        self.right._check(q_len, kv_len)


class And(_Pair):
    """Visible in both."""

    __slots__ = ()
    sign = "&"

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        return self.left._element(q, k, b, h) & self.right._element(q, k, b, h)

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        one = self.left._tiles(q_lo, q_hi, k_lo, k_hi, b, h)
        two = self.right._tiles(q_lo, q_hi, k_lo, k_hi, b, h)
        return Certainty(one.none | two.none, one.full & two.full)


class Or(_Pair):
    """Visible in either."""

    __slots__ = ()
    sign = "|"

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        return self.left._element(q, k, b, h) | self.right._element(q, k, b, h)

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        one = self.left._tiles(q_lo, q_hi, k_lo, k_hi, b, h)
        two = self.right._tiles(q_lo, q_hi, k_lo, k_hi, b, h)
        return Certainty(one.none & two.none, one.full | two.full)


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
