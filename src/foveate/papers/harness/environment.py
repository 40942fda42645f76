"""What a verdict was found on: versions, machine, threads, and the code that was judged."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate.runs.machine import machine, source_digest

# What the figures of a miniature depend on, beside its own file.
_JUDGED = ("ops", "catalog", "parts", "methods", "nn", "models", "lens", "papers/tasks",
           "papers/training")  # fmt: skip
_FILES = ("runs/timing.py",)


def environment(device: torch.device) -> dict[str, Any]:
    """Everything that the figures depend on and that isn't in the miniature, as plain data."""
    return machine(device) | {
        "code": code_digest(),
        "threads": torch.get_num_threads(),
    }


@lru_cache(maxsize=1)
def code_digest() -> str:
    """12 hex digits over the source of whatever a miniature may run."""
    root = Path(foveate.__file__).parent
    found = [f for part in _JUDGED for f in (root / part).rglob("*")]
    return source_digest([*found, *(root / name for name in _FILES)])
