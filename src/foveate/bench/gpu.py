"""Measuring on a GPU: events around each call, a cold L2 before it, and what it can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from foveate.runs.timing import Pace, spread

_FLUSH = 256 << 20  # bytes, several times any L2
_AHEAD = 4_000_000  # cycles that the GPU waits, so that no launch is waited for


class Clock:
    """Times calls on the GPU's own time line.

    Before each call a buffer larger than the L2 is written and the GPU is kept busy, so that the
    call's kernels are queued when the first event is reached: what is measured is the GPU's work
    and not Python's.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(_FLUSH, dtype=torch.int8, device=device)

    def once(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.zero_()
        torch.cuda._sleep(_AHEAD)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def race(self, calls: Mapping[str, Callable[[], object]], pace: Pace) -> dict[str, list[float]]:
        """Seconds of every call in each round, each round beginning with the next contestant."""
        for call in calls.values():
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        order, began = list(calls), time.perf_counter()
        for turn in range(pace.repeats):
            if turn >= 3 and time.perf_counter() - began > pace.budget:
                break
            for name in order:
                seconds[name].append(self.once(calls[name]))
            order = order[1:] + order[:1]
        return seconds


def matmul_peak(clock: Clock, dtype: torch.dtype, device: torch.device) -> float:
    """Operations in a second of the fastest square matrix product, on normal numbers."""
    best = 0.0
    for size in (4096, 8192):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        calls = {"product": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}
        seconds = clock.race(calls, Pace(repeats=9))["product"]
        best = max(best, 2 * size**3 / spread(seconds)["median"])
    return best


def copy_bandwidth(clock: Clock, device: torch.device) -> float:
    """Bytes in a second of a large copy within the GPU's memory, read and written ones."""
    a = torch.randn(1 << 28, device=device)
    b = torch.empty_like(a)
    seconds = clock.race({"copy": lambda: b.copy_(a)}, Pace(repeats=9))["copy"]
    return 2 * a.numel() * 4 / spread(seconds)["median"]


def environment(device: torch.device) -> dict[str, Any]:
    """The GPU and the software that drives it."""
    from foveate.bench.machine import environment as machine

    try:
        import triton

        version = triton.__version__
    except ModuleNotFoundError:
        version = "not installed"
    found = torch.cuda.get_device_properties(device)
    return {
        **machine(),
        "gpu": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": version,
    }


def required(device: str) -> torch.device:
    """The device of that name.

    Raises:
        InputError: torch sees no GPU.
    """
    from foveate.ops.errors import InputError

    if not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch sees no GPU here; leave it out for the CPU.")
    return torch.device(device)
