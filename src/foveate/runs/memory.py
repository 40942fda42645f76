"""Peak memory of one piece of work, truly its own.

On CUDA torch counts it. On Linux the kernel keeps the largest resident size of the process and
lets it be reset: freed memory is first handed back (malloc_trim), the peak is reset, the work is
done, and what the peak exceeds the size at the start is the work's. Elsewhere it isn't measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Peak:
    """Context manager; afterwards `bytes` is the extra peak memory, or None if unmeasurable."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._start = 0

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu" and how(self.device):
            give_back()
            _CLEAR.write_text("5")
            self._start = _field("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
        elif self.device.type == "cpu" and how(self.device):
            self.bytes = max(0, _field("VmHWM") - self._start)


def how(device: torch.device) -> str:
    """How memory is measured there, as a clause; empty where it can't be."""
    if device.type == "cuda":
        return "torch.cuda's peak of allocated memory, beyond what was allocated before"
    if device.type == "cpu" and sys.platform == "linux" and _resettable():
        return (
            "the kernel's peak of resident memory (VmHWM), reset before each pass with freed "
            "memory handed back, beyond what was resident before"
        )
    return ""


def give_back() -> None:
    """Hand freed memory back to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resettable() -> bool:
    if not hasattr(_resettable, "known"):
        try:
            _CLEAR.write_text("5")
            known = _field("VmHWM") > 0
        except (OSError, ValueError, IndexError):
            known = False
        _resettable.known = known  # type: ignore[attr-defined]
    return bool(_resettable.known)  # type: ignore[attr-defined]


def _field(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
