"""A mask of chosen distances between query and key: a head's slashes."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.masks.base import Certainty, Mask


class Distances(Mask):
    """Query i sees key j if i - j is chosen.

    Args:
        chosen: (N,) bool, distances 0 ... N - 1; others aren't chosen.
    """

    __slots__ = ("_before", "chosen")

    def __init__(self, chosen: Tensor) -> None:
        self.chosen = chosen
        self._before = torch.nn.functional.pad(chosen.cumsum(0), (1, 0))
        super().__init__("distances($0$)", (chosen,))

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        return self.at(q - k)

    def at(self, distance: Tensor) -> Tensor:
        """Whether distances i - j are chosen; later keys never are."""
        last = len(self.chosen) - 1
        inside = (distance >= 0) & (distance <= last)
        return self.chosen[distance.clamp(0, last)] & inside

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        low, high = q_lo - k_hi, q_hi - k_lo
        size = len(self.chosen)
        count = self._before[(high + 1).clamp(0, size)] - self._before[low.clamp(0, size)]
        return Certainty(count == 0, count == high - low + 1)
