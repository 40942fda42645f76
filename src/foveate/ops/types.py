"""The typed result of every attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)  # that keys and values may have


class AttentionOutput(NamedTuple):
    """What attention returns.

    out: (B, Hq, Lq, Dv), in the dtype of the query; 0 for a row that attends to nothing.
    lse: (B, Hq, Lq) fp32 (fp64 for fp64 inputs), natural log of the sum of exponentiated scores;
        -inf for a row that attends to nothing. Differentiable.
    """

    out: Tensor
    lse: Tensor
