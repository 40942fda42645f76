"""Neighborhoods by brute force, query by query in plain Python: what masks are held against."""

from __future__ import annotations

import itertools
import math
import random

import torch
from torch import Tensor


def axis_keys(
    i: int, length: int, k: int, s: int = 1, d: int = 1, causal: bool = False
) -> set[int]:
    """Keys of coordinate i: of all windows that fit, the one whose centre is nearest the leader's.

    The leader of a group of s queries is its middle one (the right one of two), or on a causal axis
    its last; a causal query sees what its leader's window has of itself and before.
    """
    line = list(range(i % d, length, d))
    me = line.index(i)
    group = [x for x in range(len(line)) if x // s == me // s]
    group += [x for x in range(len(line), 2 * len(line) + s) if x // s == me // s]
    if causal:
        leader = min(group[-1], len(line) - 1)
        return {line[x] for x in range(len(line)) if leader - k < x <= me}
    leader = min(group[s // 2], len(line) - 1)
    start = min(range(len(line) - k + 1), key=lambda a: abs(a + k // 2 - leader))
    return set(line[start : start + k])


def axis_table(length: int, k: int, s: int = 1, d: int = 1, causal: bool = False) -> Tensor:
    """bool (length, length), True = attend."""
    table = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        table[i, sorted(axis_keys(i, length, k, s, d, causal))] = True
    return table


def table(shape, window, stride=None, dilation=None, causal=None) -> Tensor:
    """bool (N, N): the Kronecker product of the axes' tables."""
    rank = len(shape)
    stride, dilation = stride or (1,) * rank, dilation or (1,) * rank
    causal = causal or (False,) * rank
    whole = torch.ones(1, 1)
    for axis in zip(shape, window, stride, dilation, causal):
        whole = torch.kron(whole, axis_table(*axis).float())
    return whole.bool()


def settings_1d(below: int):
    """Every (length, window, stride, dilation, causal) with a length below this."""
    for length in range(1, below):
        for d in range(1, length + 1):
            for k in range(1, length // d + 1):
                for s, causal in itertools.product(range(1, k + 1), (False, True)):
                    yield length, k, s, d, causal


def random_setting(rank: int, seed: int, most: int = 500):
    """(shape, window, stride, dilation, causal), at most so many tokens, often ragged."""
    draw = random.Random(seed)
    side = round(most ** (1 / rank))
    while True:
        shape = tuple(draw.randint(1, 2 * side) for _ in range(rank))
        if 1 < math.prod(shape) <= most:
            break
    dilation = tuple(draw.choice([1, 1, 2, 3]) for _ in shape)
    dilation = tuple(min(d, n) for d, n in zip(dilation, shape))
    window = tuple(draw.randint(1, n // d) for n, d in zip(shape, dilation))
    stride = tuple(draw.choice([1, draw.randint(1, k), k]) for k in window)
    causal = tuple(draw.random() < 0.3 for _ in shape)
    return shape, window, stride, dilation, causal
