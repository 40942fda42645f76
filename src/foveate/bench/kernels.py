"""Prefill and training shapes: masks x lengths x head sizes x dtypes x threads x passes.

Each cell is one race: the dense base (torch's SDPA and the engine without a mask) and every
backend on the cell's pattern take turns. A contestant whose output or gradients are wrong doesn't
run, and the record says so in place of a speed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.bench import catalogue, patterns
from foveate.bench.case import Case, Declined
from foveate.bench.contestants import Contestant, contestant, known, own
from foveate.bench.correct import Call, Judge, Verdict
from foveate.bench.ideal import counts, ideal_seconds, useful_flops
from foveate.bench.job import DTYPES, Begin, check_clock, check_known, check_sizes, run_cells, told
from foveate.ops import Layout
from foveate.ops.errors import FoveateError, InputError
from foveate.parts.longcontext.lengths import distributions, draw_documents
from foveate.runs.records import Records
from foveate.runs.timing import Pace, Samples, paired, race, spread, trial

PASSES = ("forward", "backward")
_SLOW = 1.5  # so many times slower in a first trial, a dense base isn't the best one


@dataclass(frozen=True)
class Cell:
    """One thing to measure: what is computed, not by whom."""

    mask: str
    length: int
    head_dim: int
    dtype: str
    direction: str
    threads: int
    tile: int
    heads: int
    kv_heads: int
    documents: str

    def __str__(self) -> str:
        return (
            f"{self.mask} L={self.length} D={self.head_dim} {self.dtype} {self.direction} "
            f"threads={self.threads} tile={self.tile}"
        )


@dataclass(frozen=True)
class Options:
    """What to measure; every combination of the lists is a cell.

    Attributes:
        masks: names of `patterns.expand`.
        lengths: tokens.
        head_dims: D.
        heads: query heads.
        kv_heads: key/value heads, a divisor of `heads`.
        dtypes: float32, bfloat16, float16.
        passes: forward, backward.
        backends: contestants; empty is `sdpa` and the best of ours, with `blocks`.
        flex: compiled FlexAttention takes part as well.
        threads: of torch.
        tiles: sizes of tiles, multiples of 8.
        documents: distribution of document lengths.
        pace: how long to measure.
        seed: of tensors, documents and random patterns.
    """

    masks: tuple[str, ...] = ("targets",)
    lengths: tuple[int, ...] = (4096,)
    head_dims: tuple[int, ...] = (64, 128)
    heads: int = 2
    kv_heads: int = 2
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    passes: tuple[str, ...] = PASSES
    backends: tuple[str, ...] = ()
    flex: bool = False
    threads: tuple[int, ...] = (1,)
    tiles: tuple[int, ...] = (64, 128)
    documents: str = "short"
    pace: Pace = field(default_factory=Pace)
    seed: int = 0

    def names(self) -> list[str]:
        """The contestants."""
        chosen = list(self.backends) or ["sdpa", *(n for n in own() if n != "reference")]
        return [*chosen, "flex"] if self.flex and "flex" not in chosen else chosen

    def check(self) -> None:
        """Refuse what can't be measured.

        Raises:
            InputError: a name is unknown or a size makes no sense.
        """
        patterns.expand(self.masks)
        check_known("backend", self.backends, known())
        check_clock(self.pace.clock, self.threads)
        check_known("dtype", self.dtypes, DTYPES)
        check_known("pass", self.passes, PASSES)
        check_known("document lengths", (self.documents,), distributions())
        check_sizes(lengths=self.lengths, head_dims=self.head_dims, threads=self.threads)
        check_sizes(heads=(self.heads,), kv_heads=(self.kv_heads,), repeats=(self.pace.repeats,))
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} query heads are no multiple of {self.kv_heads}.")
        for tile in self.tiles:
            if tile < 8 or tile % 8:
                raise InputError(f"tile {tile}: expected a multiple of 8.")

    def cells(self) -> Iterator[Cell]:
        """Every cell; tile sizes don't multiply what has no tiles."""
        for threads, dtype, head_dim, length, direction, tile, mask in itertools.product(
            self.threads, self.dtypes, self.head_dims, self.lengths, self.passes, self.tiles,
            patterns.expand(self.masks),
        ):  # fmt: skip
            if mask == "full" and tile != self.tiles[0]:
                continue
            yield Cell(
                mask, length, head_dim, dtype, direction, threads, tile, self.heads,
                self.kv_heads, self.documents,
            )  # fmt: skip


def run(
    options: Options, records: Records | None = None, begin: Begin | None = None
) -> list[dict[str, Any]]:
    """Measure every cell that isn't in the records yet; as `job.run_cells`."""
    options.check()
    how = {"contestants": options.names(), "pace": asdict(options.pace), "seed": options.seed}
    cells = list(options.cells())
    return run_cells("kernels", cells, how, lambda cell: measure(cell, options), records, begin)


def make_case(cell: Cell, seed: int) -> Case:
    """The pattern of a cell, its random parts drawn for each key/value head."""
    bounds = draw_documents(cell.length, cell.documents, seed)
    drawn = catalogue.settings(bounds, heads=cell.kv_heads, tile=cell.tile, seed=seed)
    return patterns.make(cell.mask, drawn)


def make_tensors(cell: Cell, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query (1, heads, L, D), key and value (1, kv_heads, L, D), normal."""
    random = torch.Generator().manual_seed(seed)
    dtype = DTYPES[cell.dtype]

    def draw(heads: int) -> Tensor:
        shape = (1, heads, cell.length, cell.head_dim)
        return torch.randn(shape, generator=random).to(dtype)

    return draw(cell.heads), draw(cell.kv_heads), draw(cell.kv_heads)


def measure(cell: Cell, options: Options) -> dict[str, Any]:
    """One cell: checks first, then the race; the values of its record."""
    case, tensors = make_case(cell, options.seed), make_tensors(cell, options.seed)
    everything = patterns.make(
        "full", catalogue.settings((0, cell.length), tile=cell.tile, seed=options.seed)
    )
    layout, building = _layout(case, cell.tile)
    entrants = _Entrants(cell, tensors, options.seed)
    base = ["sdpa", *(["cpu"] if "cpu" in own() else [])]
    if not case.dense:
        for name in base:
            entrants.enter("dense", name, everything, layout)
        entrants.drop_slow("dense", options.pace.clock)
    for name in dict.fromkeys([*base, *options.names()] if case.dense else options.names()):
        entrants.enter("pattern", name, case, layout)
    samples = race(entrants.calls, options.pace) if entrants.calls else {}
    seconds = {name: sample.by(options.pace.clock) for name, sample in samples.items()}
    group = "pattern" if case.dense else "dense"
    dense = {n: seconds[f"{group} {n}"] for n in base if f"{group} {n}" in seconds}
    best = min(dense, key=lambda name: spread(dense[name])["median"], default=None)
    work = useful_flops(layout, cell.heads, cell.head_dim, cell.direction)
    values: dict[str, Any] = {**counts(layout), "layout_seconds": building, "flops": work}
    if best is not None:
        middle = spread(dense[best])["median"]
        values["ideal_seconds"] = ideal_seconds(middle, layout)
        values["best_dense"] = {"backend": best, "seconds": middle}
    values["dense"] = [r for r in entrants.results if r["group"] == "dense"]
    values["results"] = [r for r in entrants.results if r["group"] == "pattern"]
    for result in entrants.results:
        mine = samples.get(f"{result['group']} {result['backend']}")
        if mine is not None:
            _fill(result, mine, seconds, dense.get(best or ""), layout, work, options.pace.clock)
    return values


def _fill(
    result: dict[str, Any],
    samples: Samples,
    seconds: dict[str, list[float]],
    best_dense: list[float] | None,
    layout: Layout,
    work: float,
    clock: str,
) -> None:
    """Put speed and ratios into the result of a contestant that ran."""
    mine = samples.by(clock)
    result["seconds"] = spread(mine)
    result["cpu_seconds"] = spread(samples.cpu)
    result["rounds"], result["calls"] = len(mine), samples.calls
    if result["group"] == "dense":
        return
    result["tflops"] = work / result["seconds"]["median"] / 1e12
    if best_dense is not None:
        result["of_ideal"] = paired(best_dense, mine, layout.tile_density)
    for other in ("sdpa", "flex"):
        theirs = seconds.get(f"pattern {other}")
        if theirs is not None and other != result["backend"]:
            result[f"vs_{other}"] = paired(theirs, mine)


def _layout(case: Case, tile: int) -> tuple[Layout, dict[str, float]]:
    """The layout, and the seconds that building it takes."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        layout = case.build(tile)
        times.append(time.perf_counter() - start)
        if times[-1] > 2:
            break
    return layout, spread(times)


class _Entrants:
    """Contestants of a cell that were checked; those that are right have a call to time."""

    def __init__(self, cell: Cell, tensors: tuple[Tensor, Tensor, Tensor], seed: int) -> None:
        self.cell, self.tensors, self.seed = cell, tensors, seed
        self.calls: dict[str, Callable[[], object]] = {}
        self.results: list[dict[str, Any]] = []
        self._judges: dict[str, Judge] = {}

    def enter(self, group: str, name: str, case: Case, layout: Layout) -> None:
        """Check a contestant; if it is right, take it into the race."""
        result: dict[str, Any] = {"group": group, "backend": name}
        self.results.append(result)
        if group not in self._judges:
            self._judges[group] = Judge.of(case, *self.tensors, self.cell.tile, self.seed)
        try:
            if name == "flex" and self.cell.direction == "backward":
                raise Declined("FlexAttention has no backward on the CPU")
            entrant = contestant(name, case, layout, self.tensors)
            verdict = self._judge(self._judges[group], entrant.call)
        except (Declined, FoveateError) as refusal:
            result["declined"] = str(refusal)
            return
        except Exception as error:  # a contestant that breaks must not end a long job
            result["failed"] = told(error)
            return
        result["correct"], result["errors"] = verdict.passed, verdict.as_dict()
        result.update(entrant.facts)
        if not verdict.passed:
            result["failed"] = f"wrong: {verdict}"
            return
        self.calls[f"{group} {name}"] = self._timed(entrant)

    def drop_slow(self, group: str, clock: str) -> None:
        """Take those out of a group that can't be its fastest: the race would wait for them."""
        mine = {name: run for name, run in self.calls.items() if name.startswith(f"{group} ")}
        if len(mine) < 2:
            return
        seconds = trial(mine, clock)
        for result in self.results:
            name = f"{group} {result['backend']}"
            if result["group"] == group and seconds.get(name, 0) > _SLOW * min(seconds.values()):
                times = seconds[name] / min(seconds.values())
                result["dropped"] = f"{times:.1f} times slower than the fastest, in a first trial"
                del self.calls[name]

    def _judge(self, judge: Judge, call: Call) -> Verdict:
        verdict = judge.forward(call)
        if self.cell.direction == "backward" and verdict.passed:
            verdict.errors.update(judge.backward(call).errors)
        return verdict

    def _timed(self, entrant: Contestant) -> Callable[[], object]:
        call = entrant.call
        if self.cell.direction == "forward":
            tensors = self.tensors

            def forward() -> object:
                with torch.no_grad():
                    return call(*tensors)

            return forward
        leaves = [x.detach().clone().requires_grad_() for x in self.tensors]
        out, _ = call(*leaves)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(self.seed))
        grad = grad.to(out.dtype)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
