"""Cells that processes measure side by side, with threads in their place and no GPU."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from foveate.bench import gpu_kernels
from foveate.runs.records import Records

OPTIONS = gpu_kernels.Options(
    masks=("full", "causal", "window@0.1"), lengths=(2048,), head_dims=(64,), passes=("forward",)
)


class Threads:
    """`Workers` whose first cells take longest; those of `broken` masks fail."""

    broken: tuple[str, ...] = ()

    def __init__(self, count: int, *_: object) -> None:
        self.pool = ThreadPoolExecutor(count)
        self.waits = iter((0.2, 0.1, 0.0))

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def measure(self, cell: gpu_kernels.Cell, peak: float) -> Future[dict[str, Any]]:
        def values(wait: float) -> dict[str, Any]:
            time.sleep(wait)
            if cell.mask in self.broken:
                raise RuntimeError(f"no {cell.mask}")
            return {"mask": cell.mask}

        return self.pool.submit(values, next(self.waits))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "Workers", Threads)
    monkeypatch.setattr(gpu_kernels, "Clock", lambda device: None)
    monkeypatch.setattr(gpu_kernels, "matmul_peak", lambda *_: 1.0)
    monkeypatch.setattr(gpu_kernels, "environment", lambda device: {"gpu": "none"})
    monkeypatch.setattr(gpu_kernels, "installed", lambda: ("triton",))


def measured(records: Records, begun: list[int]) -> list[str]:
    def begin(label: str, number: int, total: int) -> None:
        begun.append(number)

    found = gpu_kernels.run(OPTIONS, torch.device("cuda"), records, begin, workers=3)
    assert all(each["cell"]["mask"] == each["values"]["mask"] for each in found)
    return [each["values"]["mask"] for each in found]


def test_results_are_in_order_whoever_is_done_first(tmp_path) -> None:
    with Records(tmp_path) as records:
        begun: list[int] = []
        assert measured(records, begun) == ["full", "causal", "window@0.1"]
        assert begun == [0, 1, 2]


def test_a_cell_that_fails_costs_no_other(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Threads, "broken", ("window@0.1",))
    with Records(tmp_path) as records:
        with pytest.raises(RuntimeError, match="no window"):
            measured(records, [])
        assert len(records) == 2
    monkeypatch.setattr(Threads, "broken", ("full", "causal"))  # they aren't measured again
    with Records(tmp_path) as records:
        begun: list[int] = []
        assert measured(records, begun) == ["full", "causal", "window@0.1"]
        assert begun == [2]
