"""What all tests share: one thread, fixed seeds, and fresh buffers that are full of NaN."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


def _filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fresh(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return fresh


@pytest.fixture(autouse=True)
def nan_filled_buffers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel leaves unwritten must show up: torch.empty and its kin give NaN."""
    if request.node.get_closest_marker("plain_empty"):
        return
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _filled(getattr(owner, name)))
