"""Keeping autocast out of sums and solves that need the precision they are given."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def uncast(x: Tensor) -> AbstractContextManager[object]:
    """Products on the device of x run in their operands' dtype, under autocast too."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
