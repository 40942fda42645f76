"""Combiner's work, counted: items that queries score, and keys that summaries read.

Fixed: L (s + 2 L / s) or so, O(L^1.5) with s near sqrt(L); logsparse: sum of 1 + popcount(i), and L
for each level of summaries, O(L log L); axial: L (m + 2 n) or so, O(L^1.5).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from foveate.methods.combiner.method import Combiner
from foveate.ops import causal
from foveate.parts.attention import Heads
from foveate.parts.context import Context


class Items(NamedTuple):
    """Of one head under a causal mask.

    direct tokens and spans that all queries see together; keys that summaries read.
    """

    direct: int
    spans: int
    summaries: int

    @property
    def total(self) -> int:
        """All of them; each is a score and a weighted value."""
        return sum(self)


def items(recipe: Combiner, length: int) -> Items:
    """What a layer of this recipe does at a length; a mixture's parts are added up."""
    method = recipe.build(Heads(4, 1, 1, 4, 4))
    slots = method._slots()
    found = [one.items(length) for one in method._all]
    direct = sum(found[slot.start][0] for slot in slots)
    return Items(direct, sum(x[1] for x in found), sum(x[2] for x in found))


def near_root(length: int) -> int:
    """The size of blocks or rows that the paper takes: sqrt(L), a power of two."""
    return 1 << round(math.log2(length) / 2)


def coverage(recipe: Combiner, length: int) -> float:
    """Share of allowed pairs that have a weight above 0 in one layer, causal; measured.

    With the unit vectors as values, outputs are the weights of the keys; queries and keys are
    drawn, so that no exponential vanishes. Holds L x L numbers.

    Args:
        recipe: of a partition that doesn't read the layer's input.
        length: L.
    """
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, length, 8, generator=random, dtype=torch.float64)
    method = recipe.build(Heads(8, 1, 1, 8, length)).double().eval()
    unit = torch.eye(length, dtype=q.dtype)[None, None]
    with torch.no_grad():
        weights = method(q, k, unit, Context(mask=causal())).out[0, 0]
    return int((weights > 0).tril().sum()) / (length * (length + 1) / 2)
