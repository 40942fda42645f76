"""Norms: RMSNorm with its statistics in fp32, as Llama, DeepSeek and Step-3 use it; LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.ops.errors import InputError, nearest


def rms(x: Tensor, eps: float) -> Tensor:
    """sqrt(mean(x^2) + eps) over the last axis, kept; in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide.square().mean(-1, keepdim=True) + eps).sqrt()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; statistics in fp32 or wider.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.

    Args:
        dim: size of the last axis.
        eps: added to the mean square (Step-3: 1e-5, DeepSeek: 1e-6).
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., dim); same shape and dtype out."""
        return self.weight * (x / rms(x, self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


NORMS = ("rms", "layer")


def norm_of(kind: str, dim: int, eps: float) -> RMSNorm | nn.LayerNorm:
    """The norm that a text names: "rms" or "layer".

    Raises:
        InputError: another name.
    """
    if kind not in NORMS:
        raise InputError(f"norm={kind!r} is unknown; {nearest(str(kind), NORMS)}")
    return RMSNorm(dim, eps) if kind == "rms" else nn.LayerNorm(dim, eps)
