"""Decoding one token on a GPU against a long cache, as a share of what the GPU can do.

Three measures: a large copy's bandwidth; a copy of just as many bytes, read and written ones, in
the same rounds, since a short copy is slower, too; and the lower of two roofs, that bandwidth and
the fastest matrix product, which is the one that counts for many heads on a latent cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from foveate.bench.correct import Judge
from foveate.bench.gpu import Clock, copy_bandwidth, environment, matmul_peak
from foveate.bench.gpu_contestants import SDPA
from foveate.bench.job import DTYPES, Begin, check_known, check_sizes, told
from foveate.ops import Layout, attention
from foveate.ops.errors import FoveateError, InputError
from foveate.runs.records import Records, digest
from foveate.runs.timing import Pace, paired, spread

CACHES = ("whole", "paged", "selected", "latent")
NAMES = ("triton", "sdpa", *SDPA)
_LATENT = (576, 512)  # DeepSeek's: 512 of content, 64 of position
_SHARE = 8  # one tile in 8 is selected
_COPY = "copy"
_FOOTPRINT = 512 << 20  # bytes of caches gone through in turn


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    form: str
    context: int
    batch: int
    group: int
    kv_heads: int
    head_dim: int
    dtype: str
    page: int = 0

    def __str__(self) -> str:
        return (
            f"{self.form} {self.context} keys, batch {self.batch}, {self.group} heads on each of "
            f"{self.kv_heads}, D={self.head_dim} {self.dtype}"
        )

    @property
    def value_dim(self) -> int:
        """Dv."""
        return _LATENT[1] if self.form == "latent" else self.head_dim

    @property
    def keys(self) -> int:
        """Keys that a step visits."""
        return self.context // _SHARE if self.form == "selected" else self.context

    @property
    def flops(self) -> float:
        """Operations of one step."""
        heads = self.batch * self.kv_heads * self.group
        return 2.0 * heads * self.keys * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class Options:
    """What to measure; every combination is a cell.

    Attributes:
        contexts: keys in the cache, multiples of 1024.
        batches: sequences.
        groups: query heads on each key head.
        caches: of `CACHES`: whole ones; paged ones, pages of `page` keys in any order; those of
            which one tile in eight is read; latent ones, whose values are the first 512 of 576.
        backends: of `NAMES`; empty is all.
    """

    contexts: tuple[int, ...] = (8192, 32768, 131072)
    batches: tuple[int, ...] = (1, 8)
    groups: tuple[int, ...] = (1, 4, 8)
    kv_heads: int = 8
    head_dims: tuple[int, ...] = (64, 128)
    caches: tuple[str, ...] = CACHES
    dtypes: tuple[str, ...] = ("bfloat16",)
    page: int = 16
    backends: tuple[str, ...] = ()
    pace: Pace = field(default_factory=lambda: Pace(repeats=15, budget=5.0))
    seed: int = 0

    def names(self) -> tuple[str, ...]:
        """The contestants."""
        return self.backends or NAMES

    def check(self) -> None:
        """Refuse what can't be measured.

        Raises:
            InputError: a name is unknown or a size makes no sense.
        """
        check_known("backend", self.backends, NAMES)
        check_known("cache", self.caches, CACHES)
        check_known("dtype", self.dtypes, DTYPES)
        check_sizes(groups=self.groups, head_dims=self.head_dims, kv_heads=(self.kv_heads,))
        if any(n < 1024 or n % 1024 for n in self.contexts):
            raise InputError("contexts must be multiples of 1024 on a GPU.")

    def cells(self) -> Iterator[Cell]:
        """Every cell."""
        for dtype, form, context, batch in itertools.product(
            self.dtypes, self.caches, self.contexts, self.batches
        ):
            if form == "latent":
                for heads in (16, 128):
                    yield Cell(form, context, batch, heads, 1, _LATENT[0], dtype)
                continue
            page = self.page if form == "paged" else 64 if form == "selected" else 0
            dims = self.head_dims if form == "whole" else self.head_dims[-1:]
            for dim, group in itertools.product(dims, self.groups):
                yield Cell(form, context, batch, group, self.kv_heads, dim, dtype, page)


def run(
    options: Options,
    device: torch.device,
    records: Records | None = None,
    begin: Begin | None = None,
) -> list[dict[str, Any]]:
    """Measure every cell that isn't in the records yet; {"cell", "values"} of all, in order."""
    options.check()
    here, clock = environment(device), Clock(device)
    copying, peaks = 0.0, dict[str, float]()
    how = {
        "contestants": list(options.names()), "pace": asdict(options.pace), "seed": options.seed,
    }  # fmt: skip
    done, cells = [], list(options.cells())
    for number, cell in enumerate(cells):
        if begin is not None:
            begin(str(cell), number, len(cells))
        named = {"job": "gpu decode", **asdict(cell)}
        key = digest({"cell": named, "how": how, "environment": here})
        values = None if records is None else records.get(key)
        if values is None:
            copying = copying or copy_bandwidth(clock, device)
            if cell.dtype not in peaks:
                peaks[cell.dtype] = matmul_peak(clock, DTYPES[cell.dtype], device)
            values = measure(cell, options, clock, device, copying, peaks[cell.dtype])
            values["environment"] = here
            if records is not None:
                records.add(key, named, values)
        done.append({"cell": named, "values": values})
    return done


def visited(cell: Cell, seed: int) -> Layout | None:
    """The pages or tiles that each sequence reads, by batch entry and key head; None is everything.

    A paged cache is one pool for all sequences, whose pages are dealt out at random.
    """
    if not cell.page:
        return None
    random = torch.Generator().manual_seed(seed)
    count, each = cell.context // cell.page, cell.keys // cell.page
    if cell.form == "paged":
        total = count * cell.batch
        cols = torch.randperm(total, generator=random).reshape(cell.batch, 1, count)
        kv_len = total * cell.page
    else:
        drawn = [
            torch.randperm(count, generator=random)[:each].sort().values
            for _ in range(cell.batch * cell.kv_heads)
        ]
        cols = torch.stack(drawn).reshape(cell.batch, cell.kv_heads, each)
        kv_len = cell.context
    ends = torch.arange(0, cols.numel() + 1, each)
    ptr = torch.stack((ends[:-1], ends[1:]), -1).reshape(*cols.shape[:2], 2)
    flat = cols.reshape(-1).int()
    return Layout(
        q_len=1, kv_len=kv_len, q_tile=8, kv_tile=cell.page, ptr=ptr, cols=flat,
        kinds=torch.zeros_like(flat), bits=torch.zeros(0, cell.page, 1, dtype=torch.uint8),
    )  # fmt: skip


def measure(
    cell: Cell,
    options: Options,
    clock: Clock,
    device: torch.device,
    copying: float,
    peak: float,
) -> dict[str, Any]:
    """One cell: checks first, then the race; bytes and operations that can be done in a second."""
    random = torch.Generator(device).manual_seed(options.seed)
    dtype = DTYPES[cell.dtype]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).to(dtype)

    layout = visited(cell, options.seed)
    pooled = cell.form == "paged"
    rows = cell.context * cell.batch if pooled else cell.context
    stored = 1 if pooled else cell.batch
    latent = cell.form == "latent"
    per_key = cell.head_dim if latent else cell.head_dim + cell.value_dim
    size = stored * cell.kv_heads * rows * per_key * dtype.itemsize
    pairs = []
    for _ in range(max(1, min(8, _FOOTPRINT // size))):
        key = draw(stored, cell.kv_heads, rows, cell.head_dim)
        value = key[..., : cell.value_dim] if latent else draw(*key.shape[:3], cell.value_dim)
        pairs.append((key.expand(cell.batch, -1, -1, -1), value.expand(cell.batch, -1, -1, -1)))
    query = draw(cell.batch, cell.kv_heads * cell.group, 1, cell.head_dim)
    allowed = None if layout is None else layout.dense()[:1].to(device)
    keys, values = pairs[0]
    judge = Judge(
        query[:1], keys[:1], values[:1],
        None if allowed is None else lambda rows: allowed[:, :, rows], seed=options.seed,
    )  # fmt: skip
    there = None if layout is None else layout.to(device)
    first = None if layout is None else _of_first(layout).to(device)
    read = cell.batch * cell.kv_heads * cell.keys * per_key * dtype.itemsize
    calls: dict[str, Callable[[], object]] = {}
    results: list[dict[str, Any]] = []
    for name in options.names():
        result: dict[str, Any] = {"backend": name}
        results.append(result)
        if name != "triton" and (layout is not None or latent):
            result["declined"] = "whole caches only"
            continue
        try:
            verdict = judge.forward(_decoder(name, first, cell.group))
        except FoveateError as refusal:
            result["declined"] = str(refusal)
            continue
        except Exception as error:  # a contestant that breaks must not end a long job
            result["failed"] = told(error)
            continue
        result["correct"], result["errors"] = verdict.passed, verdict.as_dict()
        if not verdict.passed:
            result["failed"] = f"wrong: {verdict}"
            continue
        calls[name] = _step(_decoder(name, there, cell.group), query, pairs)
    if torch.cuda.mem_get_info(device)[0] > 1.1 * read:
        some = torch.empty(read // 2, dtype=torch.int8, device=device)
        calls[_COPY] = partial(torch.empty_like(some).copy_, some)
    seconds = clock.race(calls, options.pace)
    alike = seconds.pop(_COPY, None)
    roof = max(read / copying, cell.flops / peak)
    for result in results:
        mine = seconds.get(result["backend"])
        if mine is None:
            continue
        middle = spread(mine)["median"]
        result["seconds"], result["rounds"] = spread(mine), len(mine)
        result["gbps"] = read / middle / 1e9
        result["of_copy"] = read / middle / copying
        if alike is not None:
            result["of_copy_alike"] = paired(alike, mine)
        result["of_roof"] = roof / middle
        for other, theirs in seconds.items():
            if other != result["backend"]:
                result[f"vs_{other}"] = paired(theirs, mine)
    return {
        "bytes": read, "flops": cell.flops, "copy_gbps": copying / 1e9, "peak_tflops": peak / 1e12,
        "copy_alike_seconds": None if alike is None else spread(alike)["median"],
        "caches": len(pairs), "results": results,
    }  # fmt: skip


def _of_first(layout: Layout) -> Layout:
    """The lists of the first batch entry."""
    end = int(layout.ptr[0].max())
    return Layout(
        layout.q_len, layout.kv_len, layout.q_tile, layout.kv_tile, layout.ptr[:1],
        layout.cols[:end], layout.kinds[:end], layout.bits,
    )  # fmt: skip


def _decoder(name: str, layout: Layout | None, group: int) -> Callable[..., Any]:
    if name == "triton":
        return lambda q, k, v: attention(q, k, v, layout=layout, backend="triton")
    if name == "sdpa":
        return lambda q, k, v: (scaled_dot_product_attention(q, k, v, enable_gqa=group > 1), None)

    def chosen(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        with sdpa_kernel(SDPA[name]):
            return scaled_dot_product_attention(q, k, v, enable_gqa=group > 1), None

    return chosen


def _step(
    call: Callable[..., Any], query: Tensor, pairs: list[tuple[Tensor, Tensor]]
) -> Callable[[], object]:
    turns = itertools.cycle(pairs)

    def step() -> object:
        with torch.no_grad():
            return call(query, *next(turns))

    return step
