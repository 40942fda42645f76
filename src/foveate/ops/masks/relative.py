"""Masks that depend on how far query and key are apart: causal and window."""

from __future__ import annotations

from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.masks.base import Certainty, Mask
from foveate.ops.masks.checks import whole


class causal(Mask):  # noqa: N801 - masks read as words
    """Query i sees key j if j <= i; with `block=b`, if floor(j / b) <= floor(i / b).

    Aligned bottom-right: of Lq queries the last sees the last key.
    """

    __slots__ = ("block",)

    def __init__(self, block: int | None = None) -> None:
        self.block = 1 if block is None else whole("causal", "block", block, least=1)
        super().__init__("causal()" if block is None else f"causal(block={self.block})")

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        if self.block == 1:
            return k <= q
        return k // self.block <= q // self.block

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        if self.block > 1:
            q_lo, q_hi, k_lo, k_hi = (x // self.block for x in (q_lo, q_hi, k_lo, k_hi))
        return Certainty(k_lo > q_hi, k_hi <= q_lo)

    def _alike(
        self, q: Tensor, k: Tensor, tile: tuple[int, int], b: int, h: int
    ) -> tuple[Tensor, ...] | None:
        if self.block == 1:
            return ((q - k).clamp(-tile[0], tile[1]),)
        return _in_blocks(q, k, self.block)


class window(Mask):  # noqa: N801
    """Query i sees keys i - left ... i + right; -1 is unlimited on that side.

    With `block=b`, positions count in blocks of b: floor(i / b) - left <= floor(j / b) <= ...
    """

    __slots__ = ("block", "left", "right")

    def __init__(self, left: int, right: int, block: int | None = None) -> None:
        self.left = whole("window", "left", left, least=-1)
        self.right = whole("window", "right", right, least=-1)
        self.block = 1 if block is None else whole("window", "block", block, least=1)
        tail = "" if block is None else f", block={self.block}"
        super().__init__(f"window({self.left}, {self.right}{tail})")

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        if self.block > 1:
            q, k = q // self.block, k // self.block
        # Positions first, so that the result has the shape of both even if both sides are open.
        seen = (k >= q - self.left) if self.left >= 0 else (k == k) & (q == q)
        return seen & (k <= q + self.right) if self.right >= 0 else seen

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        if self.block > 1:
            q_lo, q_hi, k_lo, k_hi = (x // self.block for x in (q_lo, q_hi, k_lo, k_hi))
        full = (k_lo == k_lo) & (q_lo == q_lo)
        none = ~full
        if self.left >= 0:
            none = none | (k_hi < q_lo - self.left)
            full = full & (k_lo >= q_hi - self.left)
        if self.right >= 0:
            none = none | (k_lo > q_hi + self.right)
            full = full & (k_hi <= q_lo + self.right)
        return Certainty(none, full)

    def _alike(
        self, q: Tensor, k: Tensor, tile: tuple[int, int], b: int, h: int
    ) -> tuple[Tensor, ...] | None:
        if self.block > 1:
            return _in_blocks(q, k, self.block)
        reach = tile[0] + tile[1]
        ends = [self.left] * (self.left >= 0) + [-self.right] * (self.right >= 0)
        return tuple((q - k - end).clamp(-reach, reach) for end in ends)


class strided(Mask):  # noqa: N801
    """Every `stride`-th line: keys (or queries, or offsets i - j) congruent to `phase`.

    axis="key" gives columns of the attention matrix, "query" rows, "offset" diagonals.
    """

    __slots__ = ("axis", "phase", "stride")

    def __init__(self, stride: int, phase: int = 0, axis: str = "key") -> None:
        if axis not in ("key", "query", "offset"):
            raise InputError(
                f"strided(axis={axis!r}): expected 'key' (columns), 'query' (rows) or "
                "'offset' (diagonals)."
            )
        self.stride = whole("strided", "stride", stride, least=1)
        self.phase = whole("strided", "phase", phase, least=0) % self.stride
        self.axis = axis
        super().__init__(f"strided({self.stride}, {self.phase}, axis={axis!r})")

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        line = {"key": k + 0 * q, "query": q + 0 * k, "offset": q - k}[self.axis]
        return line % self.stride == self.phase

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        lo, hi = {
            "key": (k_lo + 0 * q_lo, k_hi + 0 * q_lo),
            "query": (q_lo + 0 * k_lo, q_hi + 0 * k_lo),
            "offset": (q_lo - k_hi, q_hi - k_lo),
        }[self.axis]
        first = lo + (self.phase - lo) % self.stride
        none = first > hi
        full = (lo == hi) & ~none if self.stride > 1 else ~none
        return Certainty(none, full)

    def _alike(
        self, q: Tensor, k: Tensor, tile: tuple[int, int], b: int, h: int
    ) -> tuple[Tensor, ...] | None:
        return ({"key": k, "query": q, "offset": q - k}[self.axis] % self.stride,)


def _in_blocks(q: Tensor, k: Tensor, block: int) -> tuple[Tensor, ...]:
    """Where in their blocks q and k stand, and how many blocks apart."""
    return q % block, k % block, q // block - k // block
