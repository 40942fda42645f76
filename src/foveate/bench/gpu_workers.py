"""Processes that compile cells of `gpu_kernels` side by side; one at a time measures on the GPU."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from foveate.bench.gpu_kernels import Cell, Options

_here: dict[str, Any] = {}


class Workers:
    """Processes for cells; each has its own copy of everything on the GPU.

    Args:
        count: processes.
        options: of the job.
        device: name of the GPU.
    """

    def __init__(self, count: int, options: Options, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(
            count, context, _begin, (context.Lock(), options, device)
        )  # fmt: skip

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def measure(self, cell: Cell, peak: float) -> Future[dict[str, Any]]:
        """The values of a cell, some time."""
        return self.pool.submit(_measure, cell, peak)


def _begin(lock: Any, options: Options, device: str) -> None:
    """Once in each process: one thread for torch, and one to compile with."""
    from foveate.bench.gpu import Clock

    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.set_num_threads(1)
    where = torch.device(device)
    _here.update(lock=lock, options=options, device=where, clock=Clock(where))


def _measure(cell: Cell, peak: float) -> dict[str, Any]:
    from foveate.bench.gpu_kernels import measure

    values = measure(cell, _here["options"], _here["clock"], _here["device"], peak, _here["lock"])
    torch.cuda.empty_cache()
    return values
