"""Which layers have the same attention map, and which of them shall copy.

    sim[i, j] = mean over samples of cos(A_i, A_j), maps flattened over heads and positions
    s_l = mean over j != l of sim[l, j]

Layers whose s lies below the largest gap of the sorted s stay as they are; these must be a prefix
and a suffix of the stack. The layers between are cut into blocks of k, the first of each leads and
the others follow. Rajabzadeh et al. 2024, arXiv 2409.14595, section 2.

The experiments list followers instead, which are no blocks; each copies from the nearest earlier
layer that isn't listed (our reading). `most_alike` makes such a list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops.errors import InputError

# Followers of the paper's experiments, counted from 0, in the order in which they were added. Of
# TinyLlama's 41% the paper prints eight layers; its counts need nine, and 8 is next in their order.
PAPER_LISTS = {
    "llama-160m 33%": (4, 6, 8, 10),
    "tinyllama-1.1b 23%": (2, 3, 4, 5, 7),
    "tinyllama-1.1b 41%": (2, 3, 4, 5, 6, 7, 8, 9, 18),
    "tinyllama-1.1b 77%": (2, 5, 4, 3, 7, 6, 18, 9, 8, 11, 12, 1, 17, 10, 14, 13, 16),
}


@dataclass(frozen=True)
class Similarity:
    """Sums over samples, for a mean.

    Attributes:
        total: (L, L) sum of cosines.
        samples: how many.
    """

    total: Tensor
    samples: int

    @property
    def mean(self) -> Tensor:
        """sim, (L, L), symmetric, 1 on the diagonal, between 0 and 1."""
        return self.total / max(1, self.samples)


def cosines(products: Tensor) -> Tensor:
    """(..., L, L) products <A_i, A_j> of maps -> cosines."""
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    found = products / (norms[..., :, None] * norms[..., None, :]).clamp_min(1e-30)
    found = (found + found.mT) / 2
    eye = torch.eye(found.shape[-1], dtype=torch.bool, device=found.device)
    return found.masked_fill(eye, 1.0)


def similarity(maps: Tensor, *, skip: int = 0) -> Tensor:
    """Sim of one sample's maps (L, H, n, n), or (L, ..., n, n): (L, L).

    Args:
        maps: of all layers, the same head index compared with the same.
        skip: first columns to leave out; the first one holds most of the mass of many heads (an
            attention sink) and makes any two causal maps look alike.
    """
    flat = maps[..., skip:].flatten(1).double()
    return cosines(flat @ flat.mT).to(maps.dtype)


def scores(sim: Tensor) -> Tensor:
    """S (L,): mean similarity of each layer with the others; sim (L, L)."""
    count = len(sim)
    return (sim.sum(1) - sim.diagonal()) / max(1, count - 1)


def unchanged(s: Tensor) -> tuple[int, ...]:
    """Layers that stay as they are: those below the largest gap, made a prefix and a suffix.

    A layer below the gap that has layers above it on both sides belongs to neither end, and is
    no reason to leave all before it, or all behind it, as they are: it may follow.

    Args:
        s: (L,).

    Raises:
        InputError: fewer than three layers.
    """
    count = len(s)
    if count < 3:
        raise InputError(f"EchoAtt: {count} layers are too few to choose from; expected 3 or more.")
    ordered, layers = torch.sort(s, stable=True)
    cut = int(ordered.diff().argmax()) + 1
    low = {int(n) for n in layers[:cut]}
    front, back = 0, count
    while front in low:
        front += 1
    while back - 1 in low:
        back -= 1
    return tuple(n for n in range(count) if n < front or n >= back)


def in_blocks(kept: tuple[int, ...], layers: int, size: int) -> tuple[int, ...]:
    """Followers where the layers that don't stay are cut into blocks of `size`.

    The first layer of each block leads; a last block that is shorter does too.

    Args:
        kept: layers that stay as they are.
        layers: L.
        size: k.
    """
    inner = [n for n in range(layers) if n not in kept]
    return tuple(n for at, n in enumerate(inner) if at % size)


def most_alike(
    sim: Tensor, count: int, kept: tuple[int, ...] = (0,), *, least: bool = False
) -> tuple[int, ...]:
    """The `count` layers that are most like the leaders that they would copy, chosen one by one.

    Each next one is the layer that keeps the mean similarity of all followers with their leaders
    highest (a leader is the nearest earlier layer that doesn't follow, so it changes as layers are
    added).

    Args:
        sim: (L, L).
        count: how many.
        kept: layers that stay as they are; layer 0 always does.
        least: the least similar ones instead, for comparison.

    Raises:
        InputError: there are fewer layers to choose from.
    """
    layers = len(sim)
    free = [n for n in range(1, layers) if n not in kept]
    if not 0 < count <= len(free):
        raise InputError(f"EchoAtt: {count} followers of {len(free)} layers that may follow.")
    chosen: set[int] = set()
    sign = -1.0 if least else 1.0
    for _ in range(count):
        best = max(
            (n for n in free if n not in chosen), key=lambda n: sign * _alike(sim, chosen | {n})
        )
        chosen.add(best)
    return tuple(sorted(chosen))


def _alike(sim: Tensor, chosen: set[int]) -> float:
    """Mean similarity of followers with their leaders."""
    total = 0.0
    for layer in chosen:
        leader = next(n for n in range(layer - 1, -1, -1) if n not in chosen)
        total += float(sim[layer, leader])
    return total / len(chosen)
