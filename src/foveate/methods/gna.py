"""Generalized neighborhood attention: groups of queries share one window.

With a stride s of 1 it is neighborhood attention; with 1 < s < window a strided sliding window
(HaloNet's, away from the borders), with s = window blocks. A stride that fits the tiles lets whole
tiles be visited, so that skipped work is skipped time: `foveate cost tiles` says which ones do.

Source: Hassani et al. 2025, arXiv 2504.16922.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from foveate.methods.fna.pattern import FNA, Sizes


@dataclass(frozen=True)
class GNA(FNA):
    """As `FNA`, with windows that `stride` queries share: those of the group's leader.

    Attributes:
        stride: queries on each axis that share a window, 1 to window (paper's default: 1).

    Source: Hassani et al. 2025, arXiv 2504.16922, section 3.
    """

    stride: Sizes = 1

    @property
    @override
    def strides(self) -> Sizes:
        return self.stride
