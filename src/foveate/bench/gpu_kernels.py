"""Prefill and training shapes on a GPU: masks x lengths x head sizes x passes.

As on the CPU, every cell is one race and whoever is wrong has no speed. TFLOP/s are of useful work,
pairs that attend; a share of the peak is of the fastest matrix product measured in the same run.
Compiling is not timed: FlexAttention's, for every mask, and the engine's first call stand beside.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.bench import catalogue, patterns
from foveate.bench.case import Case, Declined
from foveate.bench.contestants import Contestant
from foveate.bench.correct import Judge, Verdict
from foveate.bench.gpu import Clock, environment, matmul_peak
from foveate.bench.gpu_contestants import DENSE, NAMES, contestant, installed
from foveate.bench.gpu_workers import Workers
from foveate.bench.ideal import counts, useful_flops
from foveate.bench.job import DTYPES, Begin, check_known, check_sizes, told
from foveate.bench.lengths import draw_documents
from foveate.ops import Layout
from foveate.ops.errors import FoveateError, InputError
from foveate.runs.records import Records, digest
from foveate.runs.timing import Pace, paired, spread

PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    mask: str
    length: int
    head_dim: int
    dtype: str
    direction: str
    tile: int
    batch: int
    heads: int
    kv_heads: int
    documents: str

    def __str__(self) -> str:
        return f"{self.mask} L={self.length} D={self.head_dim} {self.dtype} {self.direction}"


@dataclass(frozen=True)
class Options:
    """What to measure; every combination of the lists is a cell.

    Attributes:
        masks: names of `patterns.expand`.
        lengths: tokens.
        tokens: batch x length is at least this, so that short sequences fill the chip.
        tile: rows and keys of a tile.
        backends: of `gpu_contestants.NAMES`; empty is all that are installed.
        others: as on the CPU.
    """

    masks: tuple[str, ...] = ("targets", "catalogue")
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    head_dims: tuple[int, ...] = (64, 128)
    heads: int = 16
    kv_heads: int = 16
    dtypes: tuple[str, ...] = ("bfloat16",)
    passes: tuple[str, ...] = PASSES
    backends: tuple[str, ...] = ()
    tile: int = 128
    tokens: int = 16384
    documents: str = "short"
    pace: Pace = field(default_factory=lambda: Pace(repeats=9, budget=5.0))
    seed: int = 0

    def names(self) -> tuple[str, ...]:
        """The contestants."""
        return self.backends or installed()

    def check(self) -> None:
        """Refuse what can't be measured.

        Raises:
            InputError: a name is unknown or a size makes no sense.
        """
        patterns.expand(self.masks)
        check_known("backend", self.backends, NAMES)
        check_known("dtype", self.dtypes, DTYPES)
        check_known("pass", self.passes, PASSES)
        check_sizes(lengths=self.lengths, head_dims=self.head_dims, heads=(self.heads,))
        check_sizes(kv_heads=(self.kv_heads,), repeats=(self.pace.repeats,))
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} query heads are no multiple of {self.kv_heads}.")
        if self.tile < 8 or self.tile % 8:
            raise InputError(f"tile {self.tile}: expected a multiple of 8.")

    def cells(self) -> Iterator[Cell]:
        """Every cell."""
        for dtype, length, head_dim, direction, mask in itertools.product(
            self.dtypes, self.lengths, self.head_dims, self.passes, patterns.expand(self.masks)
        ):
            yield Cell(
                mask, length, head_dim, dtype, direction, self.tile,
                max(1, self.tokens // length), self.heads, self.kv_heads, self.documents,
            )  # fmt: skip


def run(
    options: Options,
    device: torch.device,
    records: Records | None = None,
    begin: Begin | None = None,
    workers: int = 1,
) -> list[dict[str, Any]]:
    """Measure every cell that isn't in the records yet; {"cell", "values"} of all, in order.

    With several `workers`, processes of their own compile and build layouts side by side, and one
    at a time has the GPU to check and measure.
    """
    options.check()
    check_sizes(workers=(workers,))
    here, cells = environment(device), list(options.cells())
    how = {
        "contestants": list(options.names()), "pace": asdict(options.pace), "seed": options.seed,
        "workers": workers,
    }  # fmt: skip
    named = [{"job": "gpu kernels", **asdict(cell)} for cell in cells]
    keys = [digest({"cell": name, "how": how, "environment": here}) for name in named]
    found = [None if records is None else records.get(key) for key in keys]
    missing = [i for i, values in enumerate(found) if values is None]
    clock = Clock(device)
    peaks = {t: matmul_peak(clock, DTYPES[t], device) for t in {cells[i].dtype for i in missing}}

    def keep(index: int, values: dict[str, Any]) -> None:
        found[index] = values = {**values, "environment": here}
        if records is not None:
            records.add(keys[index], named[index], values)

    if workers == 1:
        for i in missing:
            if begin is not None:
                begin(str(cells[i]), i, len(cells))
            keep(i, measure(cells[i], options, clock, device, peaks[cells[i].dtype], nullcontext()))
    else:
        with Workers(workers, options, str(device)) as pool:
            jobs = {pool.measure(cells[i], peaks[cells[i].dtype]): i for i in missing}
            for count, job in enumerate(as_completed(jobs)):
                if begin is not None:
                    begin(str(cells[jobs[job]]), count, len(cells))
                keep(jobs[job], job.result())
    return [{"cell": n, "values": v} for n, v in zip(named, found) if v is not None]


def measure(
    cell: Cell,
    options: Options,
    clock: Clock,
    device: torch.device,
    peak: float,
    alone: AbstractContextManager[object],
) -> dict[str, Any]:
    """One cell: everything compiled, then the checks and the race, within `alone`."""
    bounds = draw_documents(cell.length, cell.documents, options.seed)
    drawn = catalogue.settings(bounds, heads=cell.kv_heads, tile=cell.tile, seed=options.seed)
    case = patterns.make(cell.mask, drawn)
    whole = patterns.make("full", catalogue.settings((0, cell.length), tile=cell.tile))
    start = time.perf_counter()
    built = case.build(cell.tile)
    building = time.perf_counter() - start
    layout = built.to(device)
    entrants = _Entrants(cell, device, options.seed)
    names = options.names()
    if not case.dense:
        for name in (name for name in DENSE if name in names):
            entrants.enter("dense", name, whole, layout)
    for name in names:
        entrants.enter("pattern", name, case, layout)
    with alone:
        entrants.check()
        seconds = clock.race(entrants.calls, options.pace)
    group = "pattern" if case.dense else "dense"
    dense = {n: seconds[f"{group} {n}"] for n in DENSE if f"{group} {n}" in seconds}
    best = min(dense, key=lambda name: spread(dense[name])["median"], default=None)
    work = cell.batch * useful_flops(built, cell.heads, cell.head_dim, cell.direction)
    for result in entrants.results:
        mine = seconds.get(f"{result['group']} {result['backend']}")
        if mine is None:
            continue
        result["seconds"], result["rounds"] = spread(mine), len(mine)
        if result["group"] == "dense":
            continue
        result["tflops"] = work / result["seconds"]["median"] / 1e12
        result["of_peak"] = work / result["seconds"]["median"] / peak
        if best is not None:
            result["of_ideal"] = paired(dense[best], mine, built.tile_density)
        for other in names:
            theirs = seconds.get(f"pattern {other}")
            if theirs is not None and other != result["backend"]:
                result[f"vs_{other}"] = paired(theirs, mine)
    return {
        **counts(built),
        "layout_seconds": building,
        "flops": work,
        "peak_tflops": peak / 1e12,
        "best_dense": None
        if best is None
        else {"backend": best, "seconds": spread(dense[best])["median"]},
        "dense": [r for r in entrants.results if r["group"] == "dense"],
        "results": [r for r in entrants.results if r["group"] == "pattern"],
    }


class _Entrants:
    """Contestants of a cell; those that are right have a call to time."""

    def __init__(self, cell: Cell, device: torch.device, seed: int) -> None:
        self.cell, self.seed = cell, seed
        self.calls: dict[str, Callable[[], object]] = {}
        self.results: list[dict[str, Any]] = []
        random = torch.Generator(device).manual_seed(seed)

        def draw(heads: int) -> Tensor:
            shape = (cell.batch, heads, cell.length, cell.head_dim)
            return torch.randn(shape, generator=random, device=device).to(DTYPES[cell.dtype])

        self.tensors = (draw(cell.heads), draw(cell.kv_heads), draw(cell.kv_heads))
        self._judges: dict[str, Judge] = {}
        self._cases: dict[str, Case] = {}
        self._entered: list[tuple[dict[str, Any], Contestant, Callable[[], object]]] = []

    def enter(self, group: str, name: str, case: Case, layout: Layout) -> None:
        """Compile a contestant by calling it once."""
        result: dict[str, Any] = {"group": group, "backend": name}
        self.results.append(result)
        self._cases[group] = case
        try:
            entrant = contestant(name, case, layout, self.cell.heads != self.cell.kv_heads)
            start = time.perf_counter()
            timed = self._timed(entrant.call)
            timed()
            torch.cuda.synchronize()
            result["first_call_seconds"] = time.perf_counter() - start
        except (Declined, FoveateError) as refusal:
            result["declined"] = str(refusal)
        except Exception as error:  # a contestant that breaks must not end a long job
            result["failed"] = told(error)
            torch.cuda.empty_cache()
        else:
            result.update(entrant.facts)
            self._entered.append((result, entrant, timed))

    def check(self) -> None:
        """Take those that are right into the race."""
        for result, entrant, timed in self._entered:
            group = result["group"]
            try:
                verdict = self._verdict(group, entrant)
            except Exception as error:
                result["failed"] = told(error)
                torch.cuda.empty_cache()
                continue
            result["correct"], result["errors"] = verdict.passed, verdict.as_dict()
            if not verdict.passed:
                result["failed"] = f"wrong: {verdict}"
                continue
            self.calls[f"{group} {result['backend']}"] = timed

    def _verdict(self, group: str, entrant: Contestant) -> Verdict:
        if group not in self._judges:
            case = self._cases[group]
            self._judges[group] = Judge.of(case, *self.tensors, self.cell.tile, self.seed)
        verdict = self._judges[group].forward(entrant.call)
        if self.cell.direction == "backward" and verdict.passed:
            verdict.errors.update(self._judges[group].backward(entrant.call).errors)
        return verdict

    def _timed(self, call: Callable[..., Any]) -> Callable[[], object]:
        tensors = self.tensors
        if self.cell.direction == "forward":

            def forward() -> object:
                with torch.no_grad():
                    return call(*tensors)

            return forward
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out, _ = call(*leaves)
        grad = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
