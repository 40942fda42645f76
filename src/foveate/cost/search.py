"""Strides and tiles for a given grid and window: which of them turn all skipped work into time.

Everything is a product over axes, so that each axis' strides are counted once and combined.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.cost.tiles import Tile, Visited, simulate
from foveate.ops import neighborhood
from foveate.ops.errors import InputError

Pair = tuple[Tile, Tile]

# (queries, keys) by rank: what the paper's kernels take.
HOPPER: dict[int, tuple[Pair, ...]] = {
    1: (((128,), (128,)), ((256,), (128,))),
    2: (((16, 8), (16, 8)),),
    3: (((4, 4, 8), (4, 4, 8)), ((2, 8, 8), (2, 8, 8))),
}
BLACKWELL: dict[int, tuple[Pair, ...]] = {
    1: (((256,), (128,)),),
    2: tuple(itertools.product(((16, 16), (8, 32)), ((16, 8), (8, 16), (4, 32)))),
    3: tuple(
        itertools.product(
            ((8, 4, 8), (2, 8, 16), (4, 4, 16), (2, 16, 8), (4, 8, 8)),
            ((4, 4, 8), (2, 8, 8), (2, 4, 16)),
        )
    ),
}
KERNELS = {"blackwell": BLACKWELL, "hopper": HOPPER}


@dataclass(frozen=True)
class Found:
    """A setting and what it visits."""

    stride: Tile
    q_tile: Tile
    kv_tile: Tile
    visited: Visited


def search(
    shape: Tile,
    window: Tile,
    pairs: tuple[Pair, ...],
    *,
    dynamic: bool = False,
    most: int = 10,
) -> list[Found]:
    """Settings in which every operation that is skipped is time saved, the smallest stride first.

    The smallest strides are closest to a sliding window. For each pair of tiles only those are
    given that no other one undercuts on every axis. Where no setting is optimal, those with the
    highest bound are given.

    Args:
        shape: of the grid.
        window: keys on each axis.
        pairs: (query tile, key tile) to try, such as `BLACKWELL[3]`.
        dynamic: see `simulate`.
        most: settings to return.

    Returns:
        Settings, by the product of their strides.
    """
    rank = len(shape)
    neighborhood(shape, window)  # refuses what doesn't fit
    found: list[Found] = []
    for q_tile, kv_tile in pairs:
        if len(q_tile) != rank or len(kv_tile) != rank:
            raise InputError(f"tiles {q_tile}, {kv_tile}: expected {rank} sizes each.")
        found += _of_tiles(shape, window, q_tile, kv_tile, dynamic)
    optimal = [one for one in found if one.visited.optimal]
    if not optimal:
        best = max(one.visited.parallel for one in found)
        optimal = [one for one in found if one.visited.parallel == best]
    optimal.sort(key=lambda one: (math.prod(one.stride), max(one.stride), one.stride,
                                  one.visited.mean))  # fmt: skip
    return optimal[:most]


def _of_tiles(shape: Tile, window: Tile, q_tile: Tile, kv_tile: Tile, dynamic: bool) -> list[Found]:
    """The smallest strides among those with the highest bound that these tiles reach."""
    worst = torch.ones((), dtype=torch.int64)
    for n, k, a, b in zip(shape, window, q_tile, kv_tile):
        counts = [
            simulate(neighborhood(n, k, s), (a,), (b,), dynamic=dynamic).worst
            for s in range(1, k + 1)
        ]
        worst = worst[..., None] * torch.tensor(counts)
    total = math.prod(-(-n // b) for n, b in zip(shape, kv_tile))
    flops = math.prod(n / k for n, k in zip(shape, window))
    good = total >= worst * flops * (1 - 1e-9)
    if not good.any():
        good = worst == worst.min()
    return [
        Found(
            stride, q_tile, kv_tile,
            simulate(neighborhood(shape, window, stride), q_tile, kv_tile, dynamic=dynamic),
        )
        for stride in _smallest(good)
    ]  # fmt: skip


def _smallest(good: Tensor) -> list[Tile]:
    """Strides that are good while none below on every axis is."""
    below = good.long()
    for axis in range(good.dim()):
        below = below.cumsum(axis)
    # Good ones at or below a stride: itself alone.
    return [tuple(x + 1 for x in at) for at in (good & (below == 1)).nonzero().tolist()]
