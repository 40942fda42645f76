"""Decoding: one new token against a long cache, held against the lower of two roofs.

A step reads K and V once and does 4 D operations for each query head and key. With few query heads
on a key/value head memory is the limit, with many (64 on one, as in MFA) compute is. Both limits
are measured in the very rounds in which the contestants run. Besides whole caches: selected tiles
of them, as a sparse method reads, and latent ones (MLA), whose values are a part of the keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.bench.contestants import own
from foveate.bench.correct import Call, Judge, Verdict
from foveate.bench.job import DTYPES, Begin, check_clock, check_known, check_sizes, run_cells, told
from foveate.bench.roofs import Pool, Product
from foveate.ops import Layout, attention
from foveate.ops.errors import FoveateError, InputError
from foveate.runs.records import Records
from foveate.runs.timing import Pace, paired, race, spread

TORCH = ("sdpa", "sdpa-rows", "matmul")
CACHES = ("whole", "mfa", "selected", "latent")
GATHER = "gather"  # selected tiles in torch: gathered, then two products
_IN_CACHE = 256 * 1024
_TILE, _SHARE = 64, 8  # one tile of 64 keys in 8 is selected
_LATENT = (576, 512)  # DeepSeek's: 512 of content, 64 of position


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    context: int
    group: int
    kv_heads: int
    head_dim: int
    dtype: str
    threads: int
    form: str = "whole"

    def __str__(self) -> str:
        return (
            f"{self.context} keys, {self.group} heads on each of {self.kv_heads}, "
            f"D={self.head_dim} {self.dtype} threads={self.threads} {self.form}"
        )

    @property
    def value_dim(self) -> int:
        """Dv."""
        return _LATENT[1] if self.form == "latent" else self.head_dim

    @property
    def keys(self) -> int:
        """Keys that a step visits."""
        if self.form != "selected":
            return self.context
        return min(self.context, max(1, self.context // _TILE // _SHARE) * _TILE)

    @property
    def flops(self) -> float:
        """Operations of one step."""
        return 2.0 * self.group * self.kv_heads * self.keys * (self.head_dim + self.value_dim)

    def contestants(self, names: list[str]) -> list[str]:
        """Those of the names that this cell is for."""
        others: dict[str, tuple[str, ...]] = {
            "selected": TORCH,
            "latent": (GATHER, "sdpa"),  # sdpa would repeat the keys for every query head
        }
        return [name for name in names if name not in others.get(self.form, (GATHER,))]


@dataclass(frozen=True)
class Options:
    """What to measure; every combination is a cell.

    Attributes:
        contexts: keys in the cache.
        groups: query heads on each key/value head.
        kv_heads: key/value heads.
        head_dims: D.
        caches: of `CACHES`: whole ones; "mfa", 64 query heads on one key/value head of 256; those
            of which one tile in eight is read, at the last head size; latent ones (D 576, of which
            the values are 512), 16 and 128 heads on one.
        dtypes: float32, bfloat16, float16.
        threads: of torch.
        backends: of `TORCH`, `GATHER` and of foveate's; empty is the former and the engine.
        footprint: bytes of caches that are gone through in turn, several times the last-level
            cache, so that every step reads its keys from memory.
        pace: how long to measure.
        seed: of the tensors.
    """

    contexts: tuple[int, ...] = (8192, 16384, 32768, 65536)
    groups: tuple[int, ...] = (1, 4, 8, 16, 64)
    kv_heads: int = 2
    head_dims: tuple[int, ...] = (64, 128)
    caches: tuple[str, ...] = CACHES
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    threads: tuple[int, ...] = (1,)
    backends: tuple[str, ...] = ()
    footprint: int = 256 << 20
    pace: Pace = field(default_factory=Pace)
    seed: int = 0

    def names(self) -> list[str]:
        """The contestants."""
        if self.backends:
            return list(self.backends)
        ours = "cpu" if "cpu" in own() else "blocks"  # blocks does a whole tile for one query
        return [*TORCH, GATHER, ours]

    def check(self) -> None:
        """Refuse what can't be measured.

        Raises:
            InputError: a name is unknown or a size makes no sense.
        """
        check_known("backend", self.backends, [*TORCH, GATHER, *own()])
        check_known("cache", self.caches, CACHES)
        check_clock(self.pace.clock, self.threads)
        check_known("dtype", self.dtypes, DTYPES)
        check_sizes(contexts=self.contexts, groups=self.groups, head_dims=self.head_dims)
        if "selected" in self.caches and any(n % _TILE for n in self.contexts):
            raise InputError(
                f"contexts must be multiples of {_TILE} where tiles of that size are selected; "
                "leave 'selected' out of the caches for others."
            )
        check_sizes(kv_heads=(self.kv_heads,), threads=self.threads)
        check_sizes(repeats=(self.pace.repeats,), footprint=(self.footprint,))

    def cells(self) -> Iterator[Cell]:
        """Every cell."""
        for threads, dtype in itertools.product(self.threads, self.dtypes):
            whole = itertools.product(self.head_dims, self.groups, self.contexts)
            for head_dim, group, context in whole if "whole" in self.caches else ():
                yield Cell(context, group, self.kv_heads, head_dim, dtype, threads)
            if "mfa" in self.caches:
                for context in self.contexts:
                    yield Cell(context, 64, 1, 256, dtype, threads)
            if "selected" in self.caches:
                for group, context in itertools.product(self.groups, self.contexts):
                    dim = self.head_dims[-1]
                    yield Cell(context, group, self.kv_heads, dim, dtype, threads, "selected")
            if "latent" in self.caches:
                for group, context in itertools.product((16, 128), self.contexts):
                    yield Cell(context, group, 1, _LATENT[0], dtype, threads, "latent")


def run(
    options: Options, records: Records | None = None, begin: Begin | None = None
) -> list[dict[str, Any]]:
    """Measure every cell that isn't in the records yet; as `job.run_cells`."""
    options.check()
    how = {
        "contestants": options.names(), "pace": asdict(options.pace), "seed": options.seed,
        "footprint": options.footprint,
    }  # fmt: skip
    cells = list(options.cells())
    return run_cells("decode", cells, how, lambda cell: measure(cell, options), records, begin)


def decoder(name: str, group: int, layout: Layout | None = None) -> Call:
    """One step by a contestant: query (B, Hq, 1, D) against keys (B, Hkv, L, D)."""
    if name == GATHER:
        assert layout is not None
        return _gatherer(layout, group)
    if name == "sdpa":
        return lambda q, k, v: (scaled_dot_product_attention(q, k, v, enable_gqa=group > 1), None)
    if name == "sdpa-rows":
        return lambda q, k, v: (
            _heads(scaled_dot_product_attention(_rows(q, group), k, v)),
            None,
        )
    if name == "matmul":
        return lambda q, k, v: (_heads(_matmul(_rows(q, group), k, v)), None)
    return lambda q, k, v: attention(q, k, v, layout=layout, backend=name)


def _gatherer(layout: Layout, group: int) -> Call:
    """Every key/value head's listed tiles copied together, then two products."""
    heads, tiles = layout.groups[1], layout.kv_len // _TILE
    listed = layout.cols.long().reshape(heads, -1)
    at = (torch.arange(heads)[:, None] * tiles + listed).reshape(-1)

    def chosen(x: Tensor) -> Tensor:
        return x.reshape(heads * tiles, -1)[at].reshape(1, heads, -1, x.shape[-1])

    return lambda q, k, v: (
        _heads(_matmul(_rows(q, group), chosen(k), chosen(v))),
        None,
    )


def _selections(cell: Cell, seed: int) -> list[Layout | None]:
    """Tiles drawn for each key/value head, as many for each; the selections share none.

    One after the other they visit the whole cache, which so is as large as it says.
    """
    if cell.form != "selected":
        return [None]
    random = torch.Generator().manual_seed(seed)
    count, each = cell.context // _TILE, cell.keys // _TILE
    drawn = [torch.randperm(count, generator=random) for _ in range(cell.kv_heads)]
    found: list[Layout | None] = []
    for start in range(0, count - each + 1, each):
        tiles = torch.zeros(1, cell.kv_heads, 1, count, dtype=torch.bool)
        for head, order in enumerate(drawn):
            tiles[0, head, 0, order[start : start + each]] = True
        found.append(Layout.from_tiles(tiles, 1, cell.context, (8, _TILE)))
    return found


def _rows(query: Tensor, group: int) -> Tensor:
    """The query heads of one key/value head as rows: (B, Hkv, group, D)."""
    return query.reshape(query.shape[0], -1, group, query.shape[-1])


def _heads(rows: Tensor) -> Tensor:
    """The way back: (B, Hq, 1, Dv)."""
    return rows.reshape(rows.shape[0], -1, 1, rows.shape[-1])


def _matmul(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    return torch.softmax(scores, -1) @ value


def measure(cell: Cell, options: Options) -> dict[str, Any]:
    """One cell: checks first, then the race of contestants and roofs; the record's values."""
    dtype = DTYPES[cell.dtype]
    shape = (1, cell.kv_heads, cell.context, cell.head_dim)
    within = cell.value_dim if cell.form == "latent" else None
    pool = Pool(shape, dtype, options.footprint, options.seed, within)
    layouts = _selections(cell, options.seed)
    layout = layouts[0]
    read = pool.bytes * cell.keys / cell.context  # by one step
    random = torch.Generator().manual_seed(options.seed + 1)
    heads = cell.kv_heads * cell.group
    query = torch.randn(1, heads, 1, cell.head_dim, generator=random).to(dtype)
    allowed = None if layout is None else layout.dense()
    judge = Judge(
        query, pool.key, pool.value, None if allowed is None else lambda rows: allowed[:, :, rows],
        seed=options.seed,
    )  # fmt: skip
    product, near = Product(dtype, options.seed), _Near(cell, query, pool)
    calls: dict[str, Callable[[], object]] = {"read": pool.read, "product": product.run}
    results: list[dict[str, Any]] = []
    in_cache_result: dict[str, Any] = {}
    for name in cell.contestants(options.names()):
        result: dict[str, Any] = {"backend": name}
        results.append(result)
        call = decoder(name, cell.group, layout)
        verdict = _judged(judge, call, result)
        if verdict is None:
            continue
        steps = [decoder(name, cell.group, layout) for layout in layouts]
        calls[f"run {name}"] = _step(steps, query, pool)
        if name == "cpu":
            whole = decoder(name, cell.group)
            if _judged(near.judge, whole, in_cache_result) is not None:
                calls["near"] = _bound_to(whole, near.tensors)
    samples = race(calls, options.pace)
    seconds = {name: sample.by(options.pace.clock) for name, sample in samples.items()}
    reads, products = seconds["read"], seconds["product"]
    in_cache = seconds.get("near")
    # What a step would take at best, in each round, by memory and by compute.
    by_memory = [t * read / pool.bytes for t in reads]
    by_compute = [t * cell.flops / product.flops for t in products]
    values: dict[str, Any] = {
        "bytes": read,
        "flops": cell.flops,
        "caches": len(pool.pairs),
        "read_gbps": pool.bytes / spread(reads)["median"] / 1e9,
        "product_gflops": product.flops / spread(products)["median"] / 1e9,
        "product_size": product.size,
        "bound": _bound(by_memory, by_compute),
    }
    if in_cache is not None:
        values["near_gflops"] = near.flops / spread(in_cache)["median"] / 1e9
        by_near = [t * cell.flops / near.flops for t in in_cache]
        values["near_bound"] = _bound(by_memory, by_near)
    elif in_cache_result:
        values["near_failed"] = in_cache_result
    for result in results:
        mine = seconds.get(f"run {result['backend']}")
        if mine is None:
            continue
        middle = spread(mine)["median"]
        result["seconds"] = spread(mine)
        result["cpu_seconds"] = spread(samples[f"run {result['backend']}"].cpu)
        result["rounds"] = len(mine)
        result["gbps"], result["gflops"] = read / middle / 1e9, cell.flops / middle / 1e9
        result["of_roof"] = paired([max(x) for x in zip(by_memory, by_compute)], mine)
        if in_cache is not None:
            result["of_near_roof"] = paired([max(x) for x in zip(by_memory, by_near)], mine)
        for other in (*TORCH, GATHER):
            theirs = seconds.get(f"run {other}")
            if theirs is not None and other != result["backend"]:
                result[f"vs_{other}"] = paired(theirs, mine)
    return {**values, "results": results}


def _bound(by_memory: list[float], by_compute: list[float]) -> str:
    return "memory" if spread(by_memory)["median"] >= spread(by_compute)["median"] else "compute"


def _judged(judge: Judge, call: Call, result: dict[str, Any]) -> Verdict | None:
    """The verdict if the contestant is right, told in its result either way."""
    try:
        verdict = judge.forward(call)
    except FoveateError as refusal:
        result["declined"] = str(refusal)
        return None
    except Exception as error:  # a contestant that breaks must not end a long job
        result["failed"] = told(error)
        return None
    result["correct"], result["errors"] = verdict.passed, verdict.as_dict()
    if not verdict.passed:
        result["failed"] = f"wrong: {verdict}"
        return None
    return verdict


def _step(calls: list[Call], query: Tensor, pool: Pool) -> Callable[[], object]:
    """The next cache by the next of the calls; each is kept until every cache had its turn."""
    turns = itertools.cycle([call for call in calls for _ in pool.pairs])

    def step() -> object:
        with torch.no_grad():
            return next(turns)(query, *pool.next())

    return step


def _bound_to(call: Call, tensors: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    def step() -> object:
        with torch.no_grad():
            return call(*tensors)

    return step


class _Near:
    """The engine's rate in cache: the same heads against few keys, many times in a call.

    One short stretch of keys stands for every entry of a large batch (stride 0), so that a call
    does as much as a long context, and reads hardly any memory. Beside the matrix product's, this
    is a second compute roof: it counts the softmax, but is the engine's own.
    """

    def __init__(self, cell: Cell, query: Tensor, pool: Pool) -> None:
        per_key = pool.bytes // cell.context
        keys = max(64, min(cell.context, _IN_CACHE * cell.threads // per_key // 64 * 64))
        batch = max(1, cell.context // keys)
        key = pool.key[:, :, :keys].contiguous().expand(batch, -1, -1, -1)
        value = pool.value[:, :, :keys].contiguous().expand(batch, -1, -1, -1)
        if cell.form == "latent":
            value = key[..., : cell.value_dim]
        self.tensors = (query.expand(batch, -1, -1, -1).contiguous(), key, value)
        self.flops = cell.flops / cell.keys * keys * batch
        self.judge = Judge(*self.tensors, None)
