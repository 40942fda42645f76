"""A causal depthwise convolution along time on the heads of q, k or v (Primer's multi-dconv-head).

    y_t[c] = b[c] + sum over a = 0 ... K-1 of w[c, a] x_{t-K+1+a}[c]

with zeros before the first token. So et al. 2021, arXiv 2109.08668, has filters for every channel
of every head; RCMHA's code has one for each channel of a head, the same for all heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class HeadConvolution(nn.Module):
    """The equation above, on x (B, H, n, D).

    Args:
        heads: H.
        channels: D.
        kernel: K, taps, the token's own included.
        shared_heads: one filter for each channel of a head; else one for each of all H D.

    Attributes:
        weight: (1 or H, D, K), the token's own tap last.
        bias: (1 or H, D).
    """

    def __init__(
        self, heads: int, channels: int, kernel: int = 3, *, shared_heads: bool = True
    ) -> None:
        super().__init__()
        filters = 1 if shared_heads else heads
        self.weight = nn.Parameter(torch.empty(filters, channels, kernel))
        self.bias = nn.Parameter(torch.empty(filters, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as torch's own convolutions do: uniform within K ** -0.5."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    @property
    def reach(self) -> int:
        """K - 1, earlier tokens that a token takes in."""
        return self.weight.shape[-1] - 1

    def forward(
        self, x: Tensor, before: Tensor | None = None, seen: Sequence[Tensor | None] = ()
    ) -> Tensor:
        """Convolve.

        Args:
            x: (B, H, n, D).
            before: (B, H, K - 1, D), what stood before x; None is zeros.
            seen: for each distance 1 ... K - 1 which tokens take in the one that stands so far
                before them, (1 or B, n) bool; None is all. Empty is None for all distances.

        Returns:
            (B, H, n, D), in x's dtype; sums are formed in fp32 or wider.
        """
        n, reach = x.shape[2], self.reach
        if before is None:
            whole = functional.pad(x, (0, 0, reach, 0))
        else:
            whole = torch.cat((before.to(x.dtype), x), 2)
        wide = torch.promote_types(x.dtype, torch.float32)
        taps = self.weight.to(wide)[:, None].unbind(-1)  # each (1 or H, 1, D)
        y = torch.addcmul(self.bias.to(wide)[:, None], x.to(wide), taps[-1])
        for distance in range(1, reach + 1):
            there = whole[:, :, reach - distance : reach - distance + n]
            mask = seen[distance - 1] if seen else None
            if mask is not None:  # padding may hold anything: it is left out, not weighed by 0
                there = there.masked_fill(~mask[:, None, :, None], 0)
            y = torch.addcmul(y, there.to(wide), taps[-1 - distance])
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        filters, channels, kernel = self.weight.shape
        return f"channels={channels}, kernel={kernel}, filters={'all heads' if filters > 1 else 1}"
