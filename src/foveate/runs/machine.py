"""What figures were taken on: versions, processor, code."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate.ops import cpu


def machine(device: torch.device) -> dict[str, Any]:
    """Everything worth knowing of the machine and the software, for people and fingerprints."""
    found: dict[str, Any] = {
        "foveate": foveate.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "device": str(device),
        "engine": (cpu.isa() if cpu.available() else "none") if device.type == "cpu" else "none",
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def source_digest(files: Iterable[Path]) -> str:
    """12 hex digits over those of the package's files that are code or a library, and are there."""
    root = Path(foveate.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(files):
        if file.suffix in {".py", ".so", ".pyd", ".dylib", ".cpp", ".h"} and file.is_file():
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def load_average() -> float | None:
    """Processes that ran or waited in the last minute, mean; None where the system doesn't say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
