"""What all tests share: one thread, fixed seeds, and fresh buffers that are full of NaN."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def nan_filled_buffers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Memory that a kernel leaves unwritten must show up: fresh buffers are full of NaN.

    torch does it itself in its deterministic mode (integers get their largest value), also for
    buffers that C++ code makes and in compiled code.
    """
    before = torch.are_deterministic_algorithms_enabled()
    fill = request.node.get_closest_marker("plain_empty") is None
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(fill, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
