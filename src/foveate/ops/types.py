"""The typed result of every attention."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionOutput(NamedTuple):
    """What attention returns.

    out: (B, Hq, Lq, Dv), in the dtype of the query; 0 for a row that attends to nothing.
    lse: (B, Hq, Lq) fp32 (fp64 for fp64 inputs), natural log of the sum of exponentiated scores;
        -inf for a row that attends to nothing. Differentiable.
    """

    out: Tensor
    lse: Tensor
