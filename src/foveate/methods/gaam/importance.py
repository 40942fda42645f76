"""The Importance Factor: which layers and features a gate keeps, over a whole data set."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.errors import InputError


def importance_factor(weights: Tensor) -> Tensor:
    """(DA - min) / (max - min), in [0, 1]; all 0 where all weights are alike.

    Args:
        weights: mean weights DA, of any shape, such as (layers, features).
    """
    low, high = weights.amin(), weights.amax()
    return (weights - low) / torch.where(high > low, high - low, 1)


class Importance:
    """Means of a gate's weights, batch by batch.

        seen = Importance()
        for x in validation:
            seen.add(gate.weights(x))
        draw_importance(seen.factor, "importance.png")      # (layers, features)

    with `draw_importance` of `foveate.models.gat`, a heat map and each layer's mean.

    Attributes:
        count: samples so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None

    def add(self, weights: Tensor) -> None:
        """Take in a batch (B, ...) of weights.

        Raises:
            InputError: its samples have another shape than those before.
        """
        total = weights.detach().double().sum(0)
        if self._sum is not None and self._sum.shape != total.shape:
            raise InputError(
                f"Importance: expected weights (B, {', '.join(map(str, self._sum.shape))}), got "
                f"{tuple(weights.shape)}."
            )
        self._sum = total if self._sum is None else self._sum + total
        self.count += len(weights)

    @property
    def mean(self) -> Tensor:
        """DA, the mean weights.

        Raises:
            InputError: nothing was added.
        """
        if self._sum is None or not self.count:
            raise InputError("Importance: add weights of a batch first.")
        return self._sum / self.count

    @property
    def factor(self) -> Tensor:
        """The Importance Factor."""
        return importance_factor(self.mean)
