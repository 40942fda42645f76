"""Neighborhood attention: naive, unfused and fused in one run, against dense and its tiles' bound.

Naive gathers every query's window, unfused multiplies tiles of windows and keeps the weights, fused
visits tiles, of tokens that lie row by row; its time stands once more for tokens that lie in their
tiles, as in a model that moves them once for all layers. The base is the better of torch's SDPA
and foveate's own dense attention. The bound on the fused form is the mean over query tiles of what
they visit (`foveate.cost.tiles`), as nobody waits on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.bench.job import DTYPES, Begin, check_clock, check_known, check_sizes, run_cells, told
from foveate.cost.tiles import simulate
from foveate.methods.fna import naive, unfused
from foveate.methods.gna import GNA
from foveate.ops import attention, neighborhood
from foveate.ops.errors import InputError
from foveate.ops.layout.grid import GridLayout, best_tiles
from foveate.runs.records import Records
from foveate.runs.timing import Pace, Samples, paired, race, spread

Tile = tuple[int, ...]
FORMS = ("naive", "unfused", "fused")
ROWS = 64  # that are checked
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


@dataclass(frozen=True)
class Setting:
    """A grid, its window and stride, the tiles (None: those that visit least), and who runs it."""

    shape: Tile
    window: Tile
    stride: Tile
    q_tile: Tile | None = None
    kv_tile: Tile | None = None
    forms: tuple[str, ...] = FORMS


FORM_SETTINGS = (
    Setting((4096,), (63,), (1,)),
    Setting((4096,), (255,), (1,)),
    Setting((64, 64), (7, 7), (1, 1)),
    Setting((64, 64), (13, 13), (1, 1)),
    Setting((64, 64), (25, 25), (1, 1)),
)
# Those of GNA's miniature.
STRIDE_SETTINGS = tuple(
    Setting((128, 128), (48, 48), stride, (16, 16), (8, 8), ("fused",))
    for stride in ((1, 1), (16, 1), (1, 16), (16, 16))
)


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    setting: Setting
    heads: int
    head_dim: int
    dtype: str
    threads: int

    def __str__(self) -> str:
        s = self.setting
        named = (("grid", s.shape), ("window", s.window), ("stride", s.stride))
        text = ", ".join(f"{name} {'x'.join(map(str, sizes))}" for name, sizes in named)
        return f"{text} D={self.head_dim} {self.dtype} threads={self.threads}"


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        settings: grids with windows.
        heads: of queries and keys.
        head_dims: width of a head.
        dtypes: float32, bfloat16, float16.
        threads: of torch.
        pace: how long to measure.
        seed: of the tensors.
    """

    settings: tuple[Setting, ...] = (*FORM_SETTINGS, *STRIDE_SETTINGS)
    heads: int = 1
    head_dims: tuple[int, ...] = (64,)
    dtypes: tuple[str, ...] = ("float32",)
    threads: tuple[int, ...] = (1,)
    pace: Pace = field(default_factory=Pace)
    seed: int = 0

    def check(self) -> None:
        """Refuse what can't be measured.

        Raises:
            InputError: a name is unknown, a size makes no sense, a window doesn't fit its grid.
        """
        check_known("dtype", self.dtypes, DTYPES)
        check_sizes(heads=(self.heads,), head_dims=self.head_dims, threads=self.threads)
        check_clock(self.pace.clock, self.threads)
        for setting in self.settings:
            neighborhood(setting.shape, setting.window, setting.stride)
            check_known("form", setting.forms, FORMS)

    def cells(self) -> Iterator[Cell]:
        """All combinations."""
        for threads in self.threads:
            for dtype in self.dtypes:
                for head_dim in self.head_dims:
                    for setting in self.settings:
                        yield Cell(setting, self.heads, head_dim, dtype, threads)


def parse(text: str) -> tuple[Setting, ...]:
    """Settings from "64x64:13x13,128x128:48x48:16x16": grid, window and, if any, stride.

    Raises:
        InputError: the text can't be read, or doesn't fit.
    """
    found = []
    for word in text.split(","):
        parts = word.strip().split(":")
        sizes = [tuple(int(n) for n in part.split("x") if n.isdecimal()) for part in parts]
        if len(parts) not in (2, 3) or not all(sizes):
            raise InputError(f"--settings {word!r}: expected such as 64x64:13x13 or 64x64:8x8:8x8.")
        stride = sizes[2] if len(sizes) == 3 else (1,) * len(sizes[0])
        neighborhood(sizes[0], sizes[1], stride)
        found.append(Setting(sizes[0], sizes[1], stride))
    return tuple(found)


def run(
    options: Options, records: Records | None = None, begin: Begin | None = None
) -> list[dict[str, Any]]:
    """Measure every cell that isn't in the records yet; see `run_cells`."""
    how = {"pace": asdict(options.pace), "seed": options.seed}
    return run_cells(
        "neighborhood", list(options.cells()), how, lambda c: measure(c, options), records, begin
    )


def measure(cell: Cell, options: Options) -> dict[str, Any]:
    """One cell: checks first, then the race; the record's values."""
    s = cell.setting
    mask = neighborhood(s.shape, s.window, s.stride)
    random = torch.Generator().manual_seed(options.seed)
    shape = (3, 1, cell.heads, mask.tokens, cell.head_dim)
    q, k, v = torch.randn(shape, generator=random).to(DTYPES[cell.dtype]).unbind(0)
    q_tile, kv_tile = (s.q_tile, s.kv_tile) if s.q_tile and s.kv_tile else best_tiles(mask)
    visited = simulate(mask, q_tile, kv_tile)
    method = GNA(s.window, stride=s.stride, shape=s.shape, q_tile=q_tile, kv_tile=kv_tile)
    calls = forms(q, k, v, mask, method, s.forms)
    rows = torch.randperm(mask.tokens, generator=random)[:ROWS]
    want = expected(q, k, v, mask, rows)
    results = []
    for name, call in list(calls.items()):
        result: dict[str, Any] = {"form": name}
        results.append(result)
        try:
            # Of tokens in tiles only what they are compared with differs: it's the fused form.
            out = call() if name != "in tiles" else _back(call(), method.tiles(mask))
            result["error"] = float((out[:, :, rows].double() - want).abs().max())
        except Exception as error:  # one that breaks must not end a long job
            result["failed"] = told(error)
            del calls[name]
            continue
        if not result["error"] <= TOLERANCE[cell.dtype] * max(1.0, float(want.abs().max())):
            result["failed"] = f"wrong: off by {result['error']:.1e}"
            del calls[name]
    dense = {"sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
             "foveate": lambda: attention(q, k, v).out}  # fmt: skip
    samples = race(calls | dense, options.pace)
    _judge(results, samples, options.pace.clock, visited.serial)
    seconds = {name: spread(samples[name].by(options.pace.clock))["median"] for name in dense}
    return {
        "q_tile": q_tile, "kv_tile": kv_tile, "bound": visited.serial, "parallel": visited.parallel,
        "flops": visited.flops, "dense": min(seconds, key=seconds.__getitem__),
        "dense_seconds": seconds, "results": results,
    }  # fmt: skip


def _judge(
    results: list[dict[str, Any]], samples: dict[str, Samples], clock: str, bound: float
) -> None:
    """Put seconds, and ratios taken round by round, into the results."""
    taken = {name: sample.by(clock) for name, sample in samples.items()}
    base = min(("sdpa", "foveate"), key=lambda name: spread(taken[name])["median"])
    for result in results:
        name = result["form"]
        if name not in taken:
            continue
        result["seconds"] = spread(taken[name])
        result["vs_dense"] = paired(taken[base], taken[name])
        if "naive" in taken:
            result["vs_naive"] = paired(taken["naive"], taken[name])
        if name in ("fused", "in tiles"):
            result["of_bound"] = paired(taken[base], taken[name], 1 / bound)


def forms(
    q: Tensor, k: Tensor, v: Tensor, mask: neighborhood, method: GNA, names: tuple[str, ...]
) -> dict[str, Callable[[], Tensor]]:
    """The calls of these forms; "fused" brings "in tiles", with its tokens moved beforehand."""
    calls: dict[str, Callable[[], Tensor]] = {}
    if "naive" in names:
        calls["naive"] = lambda: naive(q, k, v, mask).out
    if "unfused" in names:
        calls["unfused"] = lambda: unfused(q, k, v, mask).out
    if "fused" in names:
        grid = method.tiles(mask)
        tq = q.index_select(2, grid.q_slots.clamp_min(0))
        tk, tv = (x.index_select(2, grid.kv_slots.clamp_min(0)) for x in (k, v))
        calls["fused"] = lambda: method(q, k, v).out
        calls["in tiles"] = lambda: attention(tq, tk, tv, layout=grid.packed).out
    return calls


def _back(out: Tensor, grid: GridLayout) -> Tensor:
    return out.index_select(2, grid.where)


def expected(q: Tensor, k: Tensor, v: Tensor, mask: neighborhood, rows: Tensor) -> Tensor:
    """Outputs of some queries in float64, from the mask's definition: (1, H, n, D)."""
    allowed = mask.dense(len(rows), mask.tokens, q_positions=rows)
    few = (q[:, :, rows].double(), k.double(), v.double())
    return attention(*few, allowed, backend="reference").out
