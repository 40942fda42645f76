"""Tiles that a neighborhood visits, and the speed that they allow: the analytical model of GNA.

A kernel runs query tile by query tile and visits whole key tiles, so that work which is skipped
inside of a visited tile saves no time:

    total = prod ceil(L / T')                tiles that dense attention visits
    V(t)  = prod over axes of the key tiles from start(a) to end(z), for queries a ... z of tile t

Key tiles lie on a fixed grid (static), or begin where the first window does (dynamic). If all query
tiles run at once the slowest sets the time, and the bound on the speed is total / max V; an
executor that is never idle, such as a CPU core, comes to total / mean V. Where tiles divide the
grid and no axis is causal, neither passes the ratio of operations, prod L / prod window; a short
last query tile makes the mean look better than it is, as it counts like a whole one. In the
backward a key tile visits the query tiles of its
inverse ranges.

Source: Hassani et al. 2025, arXiv 2504.16922, section 3.3 (the simulator, and Amdahl's law).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from foveate.ops import neighborhood
from foveate.ops.errors import InputError
from foveate.ops.layout.grid import axis_slots, spans
from foveate.ops.masks.axis import Axis

Tile = tuple[int, ...]


@dataclass(frozen=True)
class Visited:
    """What the tiles of one setting come to.

    Attributes:
        total: key tiles that dense attention visits for each query tile.
        worst: the most that a query tile visits.
        mean: what one visits on average.
        flops: times fewer operations than dense attention has; causality isn't counted.
    """

    total: int
    worst: int
    mean: float
    flops: float

    @property
    def parallel(self) -> float:
        """Times as fast as dense, at most, where all query tiles run at once."""
        return self.total / self.worst

    @property
    def serial(self) -> float:
        """Times as fast as dense, at most, where no executor waits for another."""
        return self.total / self.mean

    @property
    def optimal(self) -> bool:
        """Whether every operation that is skipped is time saved."""
        return self.parallel >= self.flops * (1 - 1e-9)


def simulate(
    mask: neighborhood,
    q_tile: Tile,
    kv_tile: Tile,
    *,
    dynamic: bool = False,
    backward: bool = False,
) -> Visited:
    """Count the tiles that a neighborhood visits, without running or building anything.

    Args:
        mask: shape, window, stride, dilation, causality.
        q_tile: queries of a tile on each axis.
        kv_tile: keys of a tile.
        dynamic: key tiles begin where the first window of the query tile does.
        backward: the roles are exchanged: query tiles that key tiles visit.

    Raises:
        InputError: tiles of another rank or below 1; dynamic tiles in the backward.
    """
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        if len(tile) != len(mask.axes) or min(tile) < 1:
            raise InputError(f"{name}={tile}: expected {len(mask.axes)} sizes of at least 1.")
    if dynamic and backward:
        raise InputError("dynamic tiles are those of keys; the backward goes by tiles of queries.")
    counted = [
        _backward(axis, a, b) if backward else _forward(axis, a, b, dynamic)
        for axis, a, b in zip(mask.axes, q_tile, kv_tile)
    ]
    visited = q_tile if backward else kv_tile
    return Visited(
        total=math.prod(-(-axis.length // size) for axis, size in zip(mask.axes, visited)),
        worst=math.prod(worst for worst, _ in counted),
        mean=math.prod(mean for _, mean in counted),
        flops=math.prod(axis.length / axis.window for axis in mask.axes),
    )


def _forward(axis: Axis, q_tile: int, kv_tile: int, dynamic: bool) -> tuple[int, float]:
    """(most, mean) key tiles that a query tile visits on one axis."""
    start, end = spans(axis, q_tile)
    count = -(-(end - start) // kv_tile) if dynamic else -(-end // kv_tile) - start // kv_tile
    return int(count.max()), float(count.double().mean())


def _backward(axis: Axis, q_tile: int, kv_tile: int) -> tuple[int, float]:
    """(most, mean) query tiles that a key tile visits on one axis, from its inverse ranges."""
    slots, residue = axis_slots(axis, kv_tile)
    length = torch.as_tensor(axis.residue_length(residue))
    first = slots[:, 0] // axis.dilation
    last = torch.minimum(first + kv_tile, length) - 1
    begin, _ = axis.queries(first, length)
    _, end = axis.queries(last, length)
    count = -(-end // q_tile) - begin // q_tile
    return int(count.max()), float(count.double().mean())


def end_to_end(ratio: float, share: float, steps: int = 1, dense_steps: int = 0) -> float:
    """Times as fast as before a whole model is: Amdahl's law.

    Args:
        ratio: times as fast as its attention is.
        share: of the time that the attention took, 0 to 1.
        steps: of a diffusion.
        dense_steps: of these, the first so many, that keep dense attention.

    Raises:
        InputError: a share outside 0 to 1, or more dense steps than steps.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share={share}: expected a part of the time, 0 to 1.")
    if not 0 <= dense_steps <= steps or steps < 1:
        raise InputError(f"dense_steps={dense_steps}: expected 0 to {steps}, the steps there are.")
    step = 1 - share + share / ratio
    return steps / (dense_steps + (steps - dense_steps) * step)
