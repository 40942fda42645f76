"""Dense feed-forward layers: SwiGLU, and the older one with GELU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class SwiGLU(nn.Module):
    """(silu(x W_gate) * (x W_up)) W_down, without biases.

    Source: Shazeer 2020, arXiv 2002.05202, equation 6.

    Args:
        dim: width of x and y.
        hidden: width between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., dim) to y of the same shape."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class GELU(nn.Module):
    """gelu(x W_up + b) W_down + b, the layer of the first transformers.

    Args:
        dim: width of x and y.
        hidden: width between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., dim) to y of the same shape."""
        return self.down(functional.gelu(self.up(x)))
