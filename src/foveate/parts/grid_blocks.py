"""A grid of tokens cut into blocks: slabs of frames, tiles, boxes, and runs along a curve.

Tokens are counted row by row, the first axis (frames) slowest. A `Cut` names the tokens of each
block in their new order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveate.ops.errors import InputError

Grid = tuple[int, ...]
Arm = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Cut:
    """Tokens by block.

    Attributes:
        tokens: (C, W) token at each place of each block; -1 behind the last one of a short block.
    """

    tokens: Tensor

    @property
    def order(self) -> Tensor:
        """(N,) tokens, block by block."""
        return self.tokens[self.tokens >= 0]


def equal_runs(order: Tensor, size: int) -> Cut:
    """Runs of `size` tokens of an order (N,); the last may be short."""
    spare = -len(order) % size
    return Cut(torch.nn.functional.pad(order, (0, spare), value=-1).view(-1, size))


def even_runs(order: Tensor, blocks: int) -> Cut:
    """So many runs of an order (N,), whose lengths differ by one token at most."""
    ends = torch.arange(1, blocks + 1) * len(order) // blocks
    starts = torch.nn.functional.pad(ends[:-1], (1, 0))
    width = int((ends - starts).max())
    at = starts[:, None] + torch.arange(width)
    inside = at < ends[:, None]
    return Cut(order[at.clamp_max(len(order) - 1)].masked_fill(~inside, -1))


@lru_cache(maxsize=64)
def boxes(grid: Grid, box: Grid) -> Cut:
    """Boxes of `box` tokens: "(n1 b1)(n2 b2)... -> (n1 n2 ...) b1 b2 ...".

    Raises:
        InputError: the box doesn't divide the grid.
    """
    if len(box) != len(grid) or any(b < 1 or n % b for n, b in zip(grid, box)):
        raise InputError(
            f"Blocks of {_times(box)} tokens don't cut a grid of {_times(grid)} evenly; give a "
            "divisor of each side."
        )
    tokens = torch.arange(math.prod(grid)).view(grid)
    for axis in reversed(range(len(grid))):
        tokens = tokens.unflatten(axis, (grid[axis] // box[axis], box[axis]))
    outer = [2 * axis for axis in range(len(grid))]
    inner = [2 * axis + 1 for axis in range(len(grid))]
    return Cut(tokens.permute(*outer, *inner).reshape(-1, math.prod(box)))


@lru_cache(maxsize=32)
def curve(grid: Grid) -> Tensor:
    """(N,) tokens along a generalised Hilbert curve through a grid of one to three axes.

    Neighbours on the curve are neighbours on the grid, but for a step of two or three now and then
    where sides are odd (the curve known as Gilbert: boxes are halved along their longer sides).
    """
    if not 1 <= len(grid) <= 3:
        raise InputError(f"A curve goes through one to three axes, got a grid of {_times(grid)}.")
    sides = (1,) * (3 - len(grid)) + tuple(grid)
    # The curve enters along the longest side.
    axes = sorted(range(3), key=lambda axis: -sides[axis])
    arms = [_times_arm(((1, 0, 0), (0, 1, 0), (0, 0, 1))[axis], sides[axis]) for axis in axes]
    found: list[Arm] = []
    _walk((0, 0, 0), arms[0], arms[1], arms[2], found)
    at = torch.tensor(found)
    return (at[:, 0] * sides[1] + at[:, 1]) * sides[2] + at[:, 2]


def _walk(p: Arm, a: Arm, b: Arm, c: Arm, found: list[Arm]) -> None:
    """Append the cells of the box at p that is spanned by the arms a (the way through), b and c."""
    w, h, d = (abs(sum(x)) for x in (a, b, c))
    da, db, dc = (_unit(x) for x in (a, b, c))
    for length, step, others in ((w, da, h == d == 1), (h, db, w == d == 1), (d, dc, w == h == 1)):
        if others:
            for i in range(length):
                found.append(_add(p, _times_arm(step, i)))
            return
    a2, b2, c2 = _half(a), _half(b), _half(c)
    w2, h2, d2 = (abs(sum(x)) for x in (a2, b2, c2))
    if w2 % 2 and w > 2:
        a2 = _add(a2, da)
    if h2 % 2 and h > 2:
        b2 = _add(b2, db)
    if d2 % 2 and d > 2:
        c2 = _add(c2, dc)
    rest_a, rest_b, rest_c = (_sub(x, y) for x, y in ((a, a2), (b, b2), (c, c2)))
    if 2 * w > 3 * h and 2 * w > 3 * d:  # much longer than wide: halve the way alone
        _walk(p, a2, b, c, found)
        _walk(_add(p, a2), rest_a, b, c, found)
    elif 3 * h > 4 * d:  # flat: leave c whole
        _walk(p, b2, c, a2, found)
        _walk(_add(p, b2), a, rest_b, c, found)
        corner = _add(p, _sub(a, da), _sub(b2, db))
        _walk(corner, _neg(b2), c, _neg(rest_a), found)
    elif 3 * d > 4 * h:  # high: leave b whole
        _walk(p, c2, a2, b, found)
        _walk(_add(p, c2), a, b, rest_c, found)
        corner = _add(p, _sub(a, da), _sub(c2, dc))
        _walk(corner, _neg(c2), _neg(rest_a), b, found)
    else:
        _walk(p, b2, c2, a2, found)
        _walk(_add(p, b2), c, a2, rest_b, found)
        corner = _add(p, _sub(b2, db), _sub(c, dc))
        _walk(corner, a, _neg(b2), _neg(rest_c), found)
        corner = _add(p, _sub(a, da), b2, _sub(c, dc))
        _walk(corner, _neg(c), _neg(rest_a), rest_b, found)
        corner = _add(p, _sub(a, da), _sub(b2, db))
        _walk(corner, _neg(b2), c2, _neg(rest_a), found)


def _unit(x: Arm) -> Arm:
    return tuple((v > 0) - (v < 0) for v in x)  # type: ignore[return-value]


def _half(x: Arm) -> Arm:
    return tuple(v // 2 for v in x)  # type: ignore[return-value]


def _neg(x: Arm) -> Arm:
    return (-x[0], -x[1], -x[2])


def _add(*arms: Arm) -> Arm:
    return tuple(map(sum, zip(*arms)))  # type: ignore[return-value]


def _sub(x: Arm, y: Arm) -> Arm:
    return (x[0] - y[0], x[1] - y[1], x[2] - y[2])


def _times_arm(x: Arm, n: int) -> Arm:
    return (x[0] * n, x[1] * n, x[2] * n)


@lru_cache(maxsize=32)
def _offsets(rank: int) -> tuple[tuple[int, ...], ...]:
    steps = torch.cartesian_prod(*[torch.arange(-1, 2)] * rank).view(-1, rank)
    return tuple(tuple(step) for step in steps.tolist())


def touching(cut: Cut, grid: Grid) -> Tensor:
    """(C, C) bool: a token of one block lies within one step, diagonals included, of the other's.

    A block touches itself.
    """
    count = len(cut.tokens)
    block = torch.empty(math.prod(grid), dtype=torch.int64)
    real = cut.tokens >= 0
    block[cut.tokens[real]] = torch.arange(count)[:, None].expand_as(cut.tokens)[real]
    block = block.view(grid)
    found = torch.zeros(count, count, dtype=torch.bool)
    for step in _offsets(len(grid)):
        here = tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(step, grid))
        there = tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(step, grid))
        found[block[here].reshape(-1), block[there].reshape(-1)] = True
    return found


def _times(sizes: Grid) -> str:
    return " x ".join(map(str, sizes))
