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
    monkeypatch.setattr(torch, "empty", _filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _filled(torch.empty_like))
    # Not around new_empty itself: torch.compile can't trace a method taken from its class.
    monkeypatch.setattr(
        Tensor, "new_empty", _filled(lambda x, *args, **kw: x.new_zeros(*args, **kw))
    )
