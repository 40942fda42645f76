"""What the boundary predictor learns: where the attention that tokens receive jumps.

    past_i = sum_{r > i+w} sum_{c = i-w+1 .. i} A_rc
    fut_i  = sum_{r > i+w} sum_{c = i+1 .. i+w} A_rc
    ratio_i = (max(past, fut) + 1e-6) / (min(past, fut) + 1e-6),      y_i = [ratio_i >= 2]

for i in [2w - 1, L - 2w), with A the dense attention averaged over heads. Only column sums and the
band of A next to its diagonal are needed, so A is seen a few rows at a time and never held.
DHSA, arXiv 2510.24606 (labels and focal loss of its reference implementation).
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.errors import InputError

LEAST_RATIO = 2.0
POSITIVE = 1.3


class Jumps:
    """Adds up rows of A (L, L), then tells the ratios.

    Args:
        length: L.
        look: w.
    """

    def __init__(self, length: int, look: int, device: torch.device | str = "cpu") -> None:
        if length < 4 * look:
            raise InputError(f"{length} tokens are too few for labels with w = {look}.")
        self.length, self.look = length, look
        self._column = torch.zeros(length, dtype=torch.float64, device=device)
        # near[c, t] = A[c + t, c]
        self._near = torch.zeros(length, 2 * look, dtype=torch.float64, device=device)

    def add(self, first: int, rows: Tensor) -> None:
        """Rows first, first + 1, ... of A: (n, L)."""
        rows = rows.double()
        self._column += rows.sum(0)
        r = torch.arange(first, first + len(rows), device=rows.device)
        for t in range(2 * self.look):
            c = r - t
            real = c >= 0
            self._near[c[real], t] += rows[real, c[real]]

    def ratio(self) -> Tensor:
        """(L,) float64; 1 outside [2w - 1, L - 2w)."""
        w = self.look
        i = positions(self.length, w).to(self._column.device)
        within = self._near.cumsum(1)

        def mass(offsets: range) -> Tensor:
            total = torch.zeros(len(i), dtype=torch.float64, device=i.device)
            for o in offsets:
                total += self._column[i + o] - within[i + o, w - o]
            return total

        past, future = mass(range(-w + 1, 1)), mass(range(1, w + 1))
        more, less = torch.maximum(past, future), torch.minimum(past, future)
        found = torch.ones(self.length, dtype=torch.float64, device=i.device)
        found[i] = (more + 1e-6) / (less + 1e-6)
        return found


def positions(length: int, look: int) -> Tensor:
    """[2w - 1, L - 2w): the positions that are judged."""
    return torch.arange(2 * look - 1, max(2 * look - 1, length - 2 * look), device="cpu")


def labels(ratio: Tensor) -> Tensor:
    """y_i = [sigmoid(2 (log ratio - log 2)) >= 1/2] = [ratio >= 2], as floats (L,)."""
    return (ratio >= LEAST_RATIO).float()


def focal_loss(logits: Tensor, y: Tensor, look: int) -> Tensor:
    """Mean over [2w - 1, L - 2w) of (1 - p_t)^2 BCE, positives weighted 1.3.

    Args:
        logits: (..., L).
        y: (..., L) 0 or 1.
        look: w.
    """
    at = positions(logits.shape[-1], look).to(logits.device)
    logits, y = logits[..., at], y[..., at].to(logits.dtype)
    p = torch.sigmoid(logits)
    of_truth = p * y + (1 - p) * (1 - y)
    weight = torch.tensor(POSITIVE, dtype=logits.dtype, device=logits.device)
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, y, pos_weight=weight, reduction="none"
    )
    return ((1 - of_truth) ** 2 * each).mean()
