"""The window rule of neighborhood attention on one axis; everything multi-axis is a product of it.

With dilation d coordinate i is the i // d-th of the residue i mod d, and sees keys of that residue
only, by the rule of an undilated axis that is as long as the residue has coordinates. On such an
axis of length L, with window k and stride s, queries go in groups of s that share a leader's window
W = [start, end), shifted inwards at the borders, never cut:

    leader = min(floor(i / s) s + floor(s / 2), L - 1)
    centre = clamp(leader, floor(k / 2), L - 1 - floor((k - 1) / 2)),  start = centre - floor(k / 2)
    W      = [start, start + k)

On a causal axis, with the last of the group for a leader:

    leader = min(floor(i / s) s + s - 1, L - 1),  W = [max(leader - k + 1, 0), i + 1)

An even window has its extra key on the left, an even stride its leader right of the middle.

Sources: Hassani et al. 2024, arXiv 2403.04690 (s = 1); Hassani et al. 2025, arXiv 2504.16922.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops.masks.base import Certainty


@dataclass(frozen=True)
class Axis:
    """One axis of a neighborhood; 1 <= stride <= window, window * dilation <= length.

    Start and end of windows rise with the query, and both are in the residue's own coordinates.
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    @property
    def whole(self) -> bool:
        """Whether every query sees the whole axis."""
        return self.window == self.length and not self.causal

    def residue_length(self, residue: Tensor | int) -> Tensor | int:
        """How many coordinates a residue has."""
        return (self.length - residue + self.dilation - 1) // self.dilation

    def start(self, i: Tensor, length: Tensor | int) -> Tensor:
        """Start of the window of the i-th query of a residue of this length."""
        k, s = self.window, self.stride
        first, last = i // s * s, torch.as_tensor(length, device=i.device) - 1
        if self.causal:
            return (torch.minimum(first + s - 1, last) - k + 1).clamp_min(0)
        centre = torch.minimum(first + s // 2, last)
        centre = torch.minimum(centre, last - (k - 1) // 2).clamp_min(k // 2)
        return centre - k // 2

    def end(self, i: Tensor, length: Tensor | int) -> Tensor:
        """Past the last key of the i-th query of a residue of this length."""
        if self.causal:
            return torch.minimum(i + 1, torch.as_tensor(length, device=i.device))
        return self.start(i, length) + self.window

    def queries(self, j: Tensor, length: Tensor | int) -> tuple[Tensor, Tensor]:
        """(first, past the last) query of a residue that sees its j-th key: the inverse range."""
        k, s = self.window, self.stride
        length = torch.as_tensor(length, device=j.device)
        if self.causal:
            late = (j + k >= length).to(j.dtype)
            return j, torch.minimum(((j + k) // s + late) * s, length)
        left, right, off = k // 2, (k - 1) // 2, s - s // 2 - 1
        first = torch.where(j >= k, (j - right + off) // s * s, 0)
        last = torch.minimum((j + left + off + 1) // s * s, length)
        return first, torch.where(j >= length - k, length, last)

    def sees(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether coordinate q sees coordinate k; the shapes broadcast."""
        d = self.dilation
        if d == 1:
            return (k >= self.start(q, self.length)) & (k < self.end(q, self.length))
        residue, i, j = q % d, q // d, k // d
        length = self.residue_length(residue)
        inside = (j >= self.start(i, length)) & (j < self.end(i, length))
        return inside & (k % d == residue)

    def certainty(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Certainty:
        """What is sure of ranges of coordinates, ends included: nothing seen, everything seen.

        A residue has floor(L / d) or ceil(L / d) coordinates, and both ends rise with that, too.
        """
        d = self.dilation
        short, long = self.length // d, -(-self.length // d)
        none = k_hi // d < self.start(q_lo // d, short)
        none = none | (k_lo // d >= self.end(q_hi // d, long))
        if d == 1:
            full = (k_lo >= self.start(q_hi, long)) & (k_hi < self.end(q_lo, long))
            return Certainty(none, full)
        single = (q_lo == q_hi) & (k_lo == k_hi)
        seen = self.sees(q_lo, k_lo)
        return Certainty(none | (single & ~seen), single & seen)
