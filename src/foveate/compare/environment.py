"""What the figures were taken on: versions, processor, threads."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate.runs.machine import machine, source_digest

# What the figures depend on; the report's looks are not among it.
_MEASURING = ("ops", "parts", "methods", "hf", "runs")
_COMPARE = (
    "audio",
    "dense",
    "measure",
    "memory",
    "needle",
    "picture",
    "quality",
    "rounds",
    "verify",
)


def environment(device: torch.device) -> dict[str, Any]:
    """Everything worth knowing of the machine and the software, for people and fingerprints."""
    return machine(device) | {"code": code_digest()}


@lru_cache(maxsize=1)
def code_digest() -> str:
    """12 hex digits over the source of whatever computes or measures."""
    root = Path(foveate.__file__).parent
    files = [f for part in _MEASURING for f in (root / part).rglob("*") if f.is_file()]
    files += [root / "compare" / f"{name}.py" for name in _COMPARE]
    return source_digest(files)
