"""How a node takes in its neighbourhood's message (equations 6 to 8).

    bi-interaction  LeakyReLU((x + n) W1 + b1) + LeakyReLU((x * n) W2 + b2)
    gcn             LeakyReLU((x + n) W + b)
    graphsage       LeakyReLU([x ; n] W + b)

x is the node's own vector, n = sum of attention times its neighbours' vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.ops.errors import InputError

AGGREGATORS = ("bi-interaction", "gcn", "graphsage")


class Aggregator(nn.Module):
    """x, n (N, width) -> (N, out).

    Args:
        kind: one of AGGREGATORS.
        width: of x and n.
        out: of the result.
        slope: of LeakyReLU below 0 (TensorFlow's default, which the authors use, is 0.2).
        activation: in LeakyReLU's place.

    Raises:
        InputError: another kind.
    """

    def __init__(
        self,
        kind: str,
        width: int,
        out: int,
        slope: float = 0.2,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if kind not in AGGREGATORS:
            raise InputError(f"Aggregator({kind!r}): expected one of {', '.join(AGGREGATORS)}.")
        self.kind, self.slope, self.activation = kind, slope, activation
        self.first = nn.Linear(2 * width if kind == "graphsage" else width, out)
        self.second = nn.Linear(width, out) if kind == "bi-interaction" else None
        for layer in (self.first, self.second):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def _act(self, x: Tensor) -> Tensor:
        if self.activation is not None:
            return self.activation(x)
        return functional.leaky_relu(x, self.slope)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        """See the module's text."""
        if self.kind == "graphsage":
            return self._act(self.first(torch.cat((x, n), 1)))
        y = self._act(self.first(x + n))
        return y if self.second is None else y + self._act(self.second(x * n))
