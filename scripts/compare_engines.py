"""Times builds of the C++ engine against each other, in turn in one process.

    python scripts/compare_engines.py old.so new.so --what decode --groups 1,8 --lengths 8192,65536
    python scripts/compare_engines.py new.so:avx512 new.so:amx --what dense --backward

A build is a file that `python setup.py build_ext` made, with an instruction set after a colon if
not the machine's best one. A name can stand once: copy the file to compare two sets of one build.
Each line has medians in microseconds and, in brackets, the first build's time over each one's,
median of the paired rounds. Outputs are not checked: the tests do that.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from foveate import attention, causal
from foveate.ops.cpu import binding

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("foveate_forward", "foveate_backward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("builds", nargs="+", help="FILE or FILE:INSTRUCTION-SET")
    parser.add_argument("--what", choices=("decode", "dense", "causal"), default="dense")
    parser.add_argument("--backward", action="store_true", help="gradients instead of outputs")
    for name, default in (("groups", "1"), ("head-dims", "64,128"), ("lengths", "4096"),
                          ("dtypes", "fp32,bf16"), ("threads", "1")):  # fmt: skip
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    names = [build.partition(":")[0] for build in given.builds]
    if len(set(names)) < len(names):
        parser.error("a build is named twice: one file holds one choice of instruction set")
    engines = [opened(build) for build in given.builds]
    lists = (given.threads, given.dtypes, given.head_dims, given.lengths, given.groups)
    for threads, dtype, dim, length, group in product(*(x.split(",") for x in lists)):
        torch.set_num_threads(int(threads))
        q, k, v = tensors(given, DTYPES[dtype], int(dim), int(length), int(group))
        mask = causal() if given.what == "causal" else None
        calls = [timed(engine, q, k, v, mask, given.backward) for engine in engines]
        rounds = in_turn(calls, given.rounds)
        cells = (
            f"{statistics.median(mine) * 1e6:10.0f} "
            f"({statistics.median(a / b for a, b in zip(rounds[0], mine)):.2f})"
            for mine in rounds
        )
        print(f"{threads} thread(s) {dtype} D={dim} {length:>6} x{group:<3}", *cells, flush=True)


def opened(build: str) -> ctypes.CDLL:
    """The library, set to its instruction set.

    Raises:
        SystemExit: the machine or the build has no such kernels, or it is of another version.
    """
    path, _, isa = build.partition(":")
    library = ctypes.CDLL(path)
    library.foveate_call_bytes.restype = ctypes.c_int64
    if library.foveate_call_bytes() != ctypes.sizeof(binding.Call):
        raise SystemExit(f"{path} is of another version of the sources: build it again")
    for name in NAMES:
        getattr(library, name).argtypes = [ctypes.POINTER(binding.Call)]
    if isa and library.foveate_use(isa.encode()):
        raise SystemExit(f"{path} has no kernels named {isa!r} that run here")
    return library


def tensors(
    given: argparse.Namespace, dtype: torch.dtype, dim: int, length: int, group: int
) -> list[Tensor]:
    rows = 1 if given.what == "decode" else length
    shapes = ((given.kv_heads * group, rows), (given.kv_heads, length), (given.kv_heads, length))
    return [
        torch.randn(1, heads, n, dim).to(dtype).requires_grad_(given.backward)
        for heads, n in shapes
    ]


def timed(
    engine: ctypes.CDLL, q: Tensor, k: Tensor, v: Tensor, mask: object, backward: bool
) -> Callable[[], object]:
    def forward() -> Tensor:
        binding.load = lambda: (engine, "")  # type: ignore[assignment]
        return attention(q, k, v, mask, backend="cpu").out  # type: ignore[arg-type]

    if not backward:
        return forward
    out = forward()
    grad = torch.randn_like(out)

    def gradients() -> object:
        binding.load = lambda: (engine, "")  # type: ignore[assignment]
        return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    return gradients


def in_turn(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each call, round by round; short ones are repeated for 20 ms."""
    seconds: list[list[float]] = [[] for _ in calls]
    repeats = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        repeats.append(max(1, int(0.02 / (time.perf_counter() - start))))
    for _ in range(rounds):
        for call, n, mine in zip(calls, repeats, seconds):
            start = time.perf_counter()
            for _ in range(n):
                call()
            mine.append((time.perf_counter() - start) / n)
    return seconds


if __name__ == "__main__":
    main()
