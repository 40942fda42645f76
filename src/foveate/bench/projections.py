"""Decoding by projection: one new token through a whole layer, against what its cache holds.

Every projection keeps its own kinds of entries for each token, and how fast a step is follows from
reading them. In the same rounds are timed: the step of the whole layer, the attention in it, and
plain reading of the very bytes that the cache holds. The first projection is what the others are
measured against.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate import catalog
from foveate.bench.job import DTYPES, Begin, check_clock, check_known, check_sizes, run_cells, told
from foveate.nn import Attention
from foveate.nn.position import counted
from foveate.ops import causal
from foveate.ops.errors import InputError
from foveate.parts.context import Context
from foveate.parts.kv_cache import TokenCache
from foveate.parts.projection import QKV, Positions
from foveate.runs.records import Records
from foveate.runs.timing import Pace, paired, race, spread

# Of the largest output, against the same step in float64.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def every() -> tuple[str, ...]:
    """The keys of all projections, multi-head first."""
    return tuple(row.key for row in catalog.rows() if row.kind == "projection")


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    context: int
    dim: int
    heads: int
    dtype: str
    threads: int

    def __str__(self) -> str:
        return (
            f"{self.context} tokens cached, dim={self.dim}, {self.heads} heads {self.dtype} "
            f"threads={self.threads}"
        )


@dataclass(frozen=True)
class Options:
    """What to measure; every combination is a cell, with all projections in it.

    Attributes:
        projections: texts as `foveate.Attention` takes them; the first is the base.
        contexts: tokens in the cache.
        dim: width of the layer.
        heads: of the model.
        dtypes: float32, bfloat16, float16.
        threads: of torch.
        footprint: bytes of caches that are gone through in turn, several times the last-level
            cache, so that every step reads from memory.
        pace: how long to measure.
        seed: of weights, tokens and entries.
    """

    projections: tuple[str, ...] = field(default_factory=every)
    contexts: tuple[int, ...] = (8192,)
    dim: int = 1024
    heads: int = 16
    dtypes: tuple[str, ...] = ("float32",)
    threads: tuple[int, ...] = (1,)
    footprint: int = 256 << 20
    pace: Pace = field(default_factory=Pace)
    seed: int = 0

    def check(self) -> None:
        """Refuse what can't be measured.

        Raises:
            InputError: a projection or a name is unknown, or a size makes no sense.
        """
        if not self.projections:
            raise InputError("Name at least one projection; the first is the base.")
        check_clock(self.pace.clock, self.threads)
        check_known("dtype", self.dtypes, DTYPES)
        check_sizes(contexts=self.contexts, dim=(self.dim,), heads=(self.heads,))
        check_sizes(threads=self.threads, repeats=(self.pace.repeats,), footprint=(self.footprint,))
        with torch.device("meta"):
            for text in self.projections:
                Attention(self.dim, self.heads, text)

    def cells(self) -> Iterator[Cell]:
        """Every cell."""
        for threads, dtype, context in itertools.product(self.threads, self.dtypes, self.contexts):
            yield Cell(context, self.dim, self.heads, dtype, threads)


def run(
    options: Options, records: Records | None = None, begin: Begin | None = None
) -> list[dict[str, Any]]:
    """Measure every cell that isn't in the records yet; as `job.run_cells`."""
    options.check()
    how = {
        "projections": options.projections, "pace": asdict(options.pace), "seed": options.seed,
        "footprint": options.footprint,
    }  # fmt: skip
    cells = list(options.cells())
    return run_cells("projections", cells, how, lambda cell: measure(cell, options), records, begin)


class Step:
    """One projection's layer with its caches, each of which is visited in turn.

    Args:
        text: the projection.
        cell: sizes.
        footprint: bytes of all caches together, at least.
        seed: of everything.
    """

    def __init__(self, text: str, cell: Cell, footprint: int, seed: int) -> None:
        dtype = DTYPES[cell.dtype]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layer = Attention(cell.dim, cell.heads, text).to(dtype).eval()
            self.x = torch.randn(1, 1, cell.dim).to(dtype)
            fields = self.layer.projection.fields
            entries = {
                f.name: torch.randn(1, f.shape[0], cell.context, f.shape[1]).to(dtype)
                for f in fields
            }
        self.context = cell.context
        first = self._cache(entries)
        self.bytes, self.elements = first.bytes(), first.elements_per_token
        self.caches = [first]
        while len(self.caches) * self.bytes < footprint:
            self.caches.append(self._cache(entries))
        self._turns = itertools.cycle(self.caches)

    @torch.no_grad()
    def _cache(self, entries: dict[str, Tensor]) -> TokenCache:
        cache = self.layer.projection.new_cache(self.context + 1)
        cache.append(entries)
        return cache

    @torch.no_grad()
    def step(self) -> Tensor:
        """The new token through the layer, against the next cache, which then forgets it."""
        cache = next(self._turns)
        y = self.layer(self.x, mask=causal(), cache=cache).y
        cache.truncate(self.context)
        return y

    @torch.no_grad()
    def attend(self) -> Tensor:
        """The attention of a step alone, on all that the next cache holds.

        With what it takes to read it: keys that are kept un-rotated are turned here.
        """
        p, ctx = self.layer.projection, Context(mask=causal(), phase="decode")
        ctx.scale = p.scale
        q, held = p.query(self.x), next(self._turns).entries
        if p.rotates_on_read:  # a part of reading it
            last = counted(ctx.store, self.context - 1, self.context, q.device)
            places = Positions(last, counted(ctx.store, 0, self.context, q.device))
            q, held = self.layer.rotated(q, held, places, ctx)
        qkv = p.absorb(q, held) if p.absorbs("decode") else QKV(q, *p.expand(held))
        selection = p.select(self.x, q, None, "decode") if p.selects else None
        return p.attend(self.layer.attention, qkv, ctx, selection)

    @torch.no_grad()
    def read(self) -> object:
        """Read what the next cache holds, and do next to nothing with it.

        Summed as fp32, whatever the bytes mean: torch's sums of narrower numbers convert each one
        and are slower than memory.
        """
        return [x.view(torch.float32).sum() for x in next(self._turns).entries.values()]

    @torch.no_grad()
    def error(self) -> float:
        """Largest difference to the same step in float64, as a share of the largest output."""
        exact = deepcopy(self.layer).double()
        cache = exact.projection.new_cache(self.context + 1)
        cache.append({name: x.double() for name, x in self.caches[0].entries.items()})
        ctx = Context(mask=causal(), phase="decode", backend="reference")
        expected = exact(self.x.double(), cache=cache, ctx=ctx).y
        return float((self.step().double() - expected).abs().max() / expected.abs().max())


def measure(cell: Cell, options: Options) -> dict[str, Any]:
    """One cell: checks first, then the race; the record's values."""
    results: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], object]] = {}
    for text in options.projections:
        result: dict[str, Any] = {"projection": text}
        results.append(result)
        try:
            mine = Step(text, cell, options.footprint, options.seed)
            result |= {"bytes": mine.bytes, "elements": mine.elements, "error": mine.error()}
        except Exception as error:  # one that breaks must not end a long job
            result["failed"] = told(error)
            continue
        result["correct"] = result["error"] <= TOLERANCE[cell.dtype]
        if not result["correct"]:
            result["failed"] = f"wrong: off by {result['error']:.1e} of the largest output"
            continue
        calls |= {
            f"step {text}": mine.step, f"attend {text}": mine.attend, f"read {text}": mine.read,
        }  # fmt: skip
    samples = race(calls, options.pace) if calls else {}
    seconds = {name: sample.by(options.pace.clock) for name, sample in samples.items()}
    base = seconds.get(f"step {options.projections[0]}")
    for result in results:
        text = result["projection"]
        if f"step {text}" not in seconds:
            continue
        step, attend, read = (seconds[f"{what} {text}"] for what in ("step", "attend", "read"))
        result["seconds"], result["attend_seconds"] = spread(step), spread(attend)
        result["gbps"] = result["bytes"] / spread(attend)["median"] / 1e9
        result["of_read"] = paired(read, attend)
        if base is not None:
            result["vs_base"] = paired(base, step)
    return {"base": options.projections[0], "results": results}
