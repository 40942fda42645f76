"""What the figures were taken on, and a digest of the code that they depend on."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate.runs.machine import processor

_PARTS = ("ops", "parts/longcontext", "parallel", "bench", "runs", "data/bench")
_LOOKS = {
    "show.py", "figure.py", "command.py", "gpu_show.py", "gpu_figure.py", "gpu_command.py",
}  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions and processor."""
    return {
        "foveate": foveate.__version__,
        "code": code_digest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
    }


@lru_cache(maxsize=1)
def code_digest() -> str:
    """12 hex digits over the source, and the libraries, of what computes or measures."""
    root = Path(foveate.__file__).parent
    digest = hashlib.sha256()
    for part in _PARTS:
        for file in sorted((root / part).rglob("*")):
            if "__pycache__" not in file.parts and file.is_file() and file.name not in _LOOKS:
                digest.update(file.relative_to(root).as_posix().encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
