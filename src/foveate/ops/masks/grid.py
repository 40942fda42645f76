"""Neighborhoods on 1-D, 2-D and 3-D grids of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops.errors import InputError
from foveate.ops.masks.axis import Axis
from foveate.ops.masks.base import Certainty, Mask
from foveate.ops.masks.checks import whole

if TYPE_CHECKING:
    from foveate.ops.layout import Layout

T = TypeVar("T", int, bool)
MOST_AXES = 3


class neighborhood(Mask):  # noqa: N801 - masks read as words
    """Every token of a grid sees the window of its nearest tokens, shifted inwards at the borders.

    Tokens are numbered row by row, the last axis fastest. A query sees a key if it does on every
    axis, by the rule of `foveate.ops.masks.axis`; so it sees exactly prod(window) keys, fewer on
    causal axes only. A stride lets groups of queries share one window: with stride = window these
    are blocks. Tokens outside the grid see nothing; other tokens beside it (text, registers) are
    told by `region`.

    Args:
        shape: of the grid, one to three axes; an int is one axis.
        window: keys on each axis, or one number for all.
        stride: queries on each axis that share a window, 1 to window.
        dilation: distance of neighbouring keys; window * dilation fits on the axis.
        causal: whether a query sees no later key on that axis, all others being free.

    Raises:
        InputError: numbers that don't fit the shape.

    Source: Hassani et al. 2024, arXiv 2403.04690; strides: 2025, arXiv 2504.16922.
    """

    __slots__ = ("axes", "shape", "tokens")

    def __init__(
        self,
        shape: int | Sequence[int],
        window: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
    ) -> None:
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        self.shape = tuple(whole("neighborhood", "shape", n, least=1) for n in sizes)
        if not 1 <= len(self.shape) <= MOST_AXES:
            raise InputError(f"neighborhood(shape={shape!r}): expected 1 to {MOST_AXES} axes.")
        rank = len(self.shape)
        windows = _each("window", window, rank)
        strides, dilations = _each("stride", stride, rank), _each("dilation", dilation, rank)
        flags = per_axis("neighborhood", "causal", causal, rank)
        if not all(isinstance(flag, bool) for flag in flags):
            raise InputError(f"neighborhood(causal={causal!r}): expected True or False for axes.")
        self.axes = tuple(Axis(*of) for of in zip(self.shape, windows, strides, dilations, flags))
        for number, axis in enumerate(self.axes):
            _check_axis(number, axis)
        self.tokens = math.prod(self.shape)
        super().__init__(
            f"neighborhood({self.shape}, {windows}"
            + (f", stride={strides}" if set(strides) != {1} else "")
            + (f", dilation={dilations}" if set(dilations) != {1} else "")
            + (f", causal={flags}" if any(flags) else "")
            + ")"
        )

    def _check(self, q_len: int, kv_len: int) -> None:
        if kv_len != self.tokens or q_len > kv_len:
            grid = " x ".join(map(str, self.shape))
            raise InputError(
                f"{self.spec} is for a grid of {grid} = {self.tokens} tokens, but there are "
                f"{q_len} queries and {kv_len} keys. Tokens beside the grid are told by "
                "region(neighborhood(...), queries, keys) | ..."
            )

    @override
    def _ordered(
        self, q_len: int, kv_len: int, tile: tuple[int, int], device: torch.device
    ) -> Layout | None:
        """Over multi-axis tiles, which are far fewer than those of rows, and found far sooner.

        On one axis the tiles of a residue, where there is more than one.
        """
        from foveate.ops.layout.grid import best_tiles, grid_layout

        powers = all(size & (size - 1) == 0 for size in tile)
        rows = len(self.axes) == 1 and self.axes[0].dilation == 1
        if rows or q_len != self.tokens or not powers:
            return None
        return grid_layout(self, *best_tiles(self, *tile), (0, 0), str(device)).row_by_row

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        seen = (q >= 0) & (q < self.tokens) & ((k >= 0) & (k < self.tokens))
        step = self.tokens
        for axis in self.axes:
            step //= axis.length
            seen = seen & axis.sees(q // step % axis.length, k // step % axis.length)
        return seen

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        none = (q_lo >= self.tokens) | (q_hi < 0) | ((k_lo >= self.tokens) | (k_hi < 0))
        full = (q_lo >= 0) & (q_hi < self.tokens) & ((k_lo >= 0) & (k_hi < self.tokens))
        q_sides, k_sides = self._sides(q_lo, q_hi), self._sides(k_lo, k_hi)
        for axis, q, k in zip(self.axes, q_sides, k_sides):
            sure = axis.certainty(*q, *k)
            none, full = none | sure.none, full & sure.full
        return Certainty(none, full)

    def _sides(self, lo: Tensor, hi: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Ranges of coordinates that hold all tokens lo ... hi.

        They are everything on axes behind one on which the two differ.
        """
        lo, hi = lo.clamp(0, self.tokens - 1), hi.clamp(0, self.tokens - 1)
        same, step, found = torch.ones_like(lo, dtype=torch.bool), self.tokens, []
        for axis in self.axes:
            step //= axis.length
            first, last = lo // step % axis.length, hi // step % axis.length
            found.append((first.where(same, 0), last.where(same, axis.length - 1)))
            same = same & (first == last)
        return found


def per_axis(owner: str, name: str, given: T | Sequence[T], rank: int) -> tuple[T, ...]:
    """One value for each axis, from one for all or from a sequence.

    Raises:
        InputError: a sequence of another length.
    """
    if isinstance(given, int):
        return (given,) * rank
    try:
        values = tuple(given)
    except TypeError as error:
        raise InputError(f"{owner}({name}={given!r}): expected one for each axis.") from error
    if len(values) != rank:
        raise InputError(f"{owner}({name}={given!r}): expected {rank} values, one for each axis.")
    return values


def _each(name: str, given: int | Sequence[int], rank: int) -> tuple[int, ...]:
    values = per_axis("neighborhood", name, given, rank)
    return tuple(whole("neighborhood", name, value, least=1) for value in values)


def _check_axis(number: int, axis: Axis) -> None:
    if axis.stride > axis.window:
        raise InputError(
            f"neighborhood: axis {number} has stride {axis.stride}, but its window is "
            f"{axis.window}; queries that share a window must lie in it."
        )
    if axis.window * axis.dilation > axis.length:
        raise InputError(
            f"neighborhood: axis {number} has {axis.length} tokens, too few for a window of "
            f"{axis.window} with dilation {axis.dilation}; expected window * dilation <= length."
        )
