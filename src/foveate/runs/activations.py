"""Figures of a layer's hidden states and values: outliers, and what they cost when quantised.

A massive activation (Sun et al. 2024, arXiv 2402.17762) is an entry with |x| > 100 and |x| > 1000
times the median |x| of the layer's hidden states.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.ops.errors import InputError

ABSOLUTE, RELATIVE = 100.0, 1000.0


@dataclass(frozen=True)
class Activations:
    """Of one layer's hidden states x (B, L, dim).

    Attributes:
        largest: max |x|, the infinity norm.
        elsewhere: max |x| without the tokens that hold a massive entry.
        median: of |x|.
        massive: entries that are massive.
        tokens: positions that hold one, over all sequences, the first few.
        channels: channels that hold one, the first few.
        kurtosis: fourth central moment over the squared variance, all entries; 3 for a Gaussian.
        peak: ||x_0|| / mean_j ||x_j||, mean over sequences: the residual norm of the first token.
        int8, int4: root mean square error of symmetric quantisation with one scale for the tensor,
            over the root mean square of x.
    """

    largest: float
    elsewhere: float
    median: float
    massive: int
    tokens: tuple[int, ...]
    channels: tuple[int, ...]
    kurtosis: float
    peak: float
    int8: float
    int4: float

    def as_dict(self) -> dict[str, Any]:
        """As plain data, the same before and after JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@torch.no_grad()
def activations(x: Tensor, real: Tensor | None = None, most: int = 8) -> Activations:
    """Measure hidden states.

    Args:
        x: (B, L, dim).
        real: (B, L) bool, False on padding, which doesn't count.
        most: positions and channels that are named.

    Raises:
        InputError: x isn't (B, L, dim), or has no token.
    """
    if x.dim() != 3 or not x.numel():
        raise InputError(f"activations: expected x (B, L, dim), got {tuple(x.shape)}.")
    x = x.float()
    rows = x.reshape(-1, x.shape[2]) if real is None else x[real]
    size = rows.abs()
    median = float(size.flatten().median())
    outlier = (size > ABSOLUTE) & (size > RELATIVE * median)
    loud = outlier.any(1)
    at = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    places = (at.reshape(-1) if real is None else at[real])[loud].unique()[:most]
    quiet = size[~loud]
    centred = rows - rows.mean()
    norms = x.norm(dim=-1)
    mean = norms.mean(1) if real is None else (norms * real).sum(1) / real.sum(1).clamp_min(1)
    return Activations(
        largest=float(size.max()),
        elsewhere=float(quiet.max()) if quiet.numel() else 0.0,
        median=median,
        massive=int(outlier.sum()),
        tokens=tuple(places.tolist()),
        channels=tuple(outlier.any(0).nonzero()[:most, 0].tolist()),
        kurtosis=float(centred.pow(4).mean() / centred.square().mean().square().clamp_min(1e-30)),
        peak=float((norms[:, 0] / mean.clamp_min(1e-30)).mean()),
        int8=quantised_error(rows, 8),
        int4=quantised_error(rows, 4),
    )


def quantised_error(x: Tensor, bits: int) -> float:
    """RMS error of x rounded to 2^(bits-1) - 1 steps on each side of 0, over the RMS of x.

    Args:
        x: any shape; one scale for all of it, max |x|.
        bits: at least 2.
    """
    if bits < 2:
        raise InputError(f"quantised_error(bits={bits}): expected 2 or more.")
    x = x.float()
    top = float(x.abs().max())
    if top == 0:
        return 0.0
    step = top / (2 ** (bits - 1) - 1)
    off = (x / step).round() * step - x
    return float(off.square().mean().sqrt() / x.square().mean().sqrt())
