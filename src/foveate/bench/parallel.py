"""Context parallelism: schemes and shardings over masks, lengths and ranks, on this machine.

Ranks are gloo processes, one thread each. For every mask, length and number of ranks all
contestants run in one group of processes and take turns. Each result is checked against one rank
with everything, output and gradients; what it sends is counted where it leaves and stands beside
the formulas. On fewer cores than ranks the clock on the wall says nothing of a cluster: what does
is the busiest rank's processor time, and "speed-up" is one rank's by that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from foveate.bench.job import DTYPES, Begin, check_known, check_sizes, run_cells, told
from foveate.bench.parallel_ranks import Task, rank_of
from foveate.ops.errors import InputError
from foveate.parallel.context import scheme_of, sharding_of
from foveate.parallel.spawn import RanksError, run
from foveate.parts.longcontext import distributions, names
from foveate.runs.records import Records

SCHEMES = ("all-gather", "ring", "ulysses", "usp(ulysses=2)", "magi")


@dataclass(frozen=True)
class Cell:
    """One group of processes; all contestants run in it."""

    mask: str
    length: int
    ranks: int
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.mask}, {self.length} tokens on {self.ranks} ranks"


@dataclass(frozen=True)
class Options:
    """What to measure; every combination is run.

    Attributes:
        schemes: by name, with options.
        shardings: by name; each with each scheme.
        masks: names of the catalogue.
        lengths: tokens of the whole sequence.
        ranks: numbers of processes.
        heads: query heads.
        kv_heads: key heads.
        head_dim: of keys and values.
        dtype: float32, bfloat16, float16.
        documents: their distribution.
        repeats: rounds.
        seed: of everything drawn.
        timeout: seconds for one group of processes.
    """

    schemes: tuple[str, ...] = SCHEMES
    shardings: tuple[str, ...] = ("contiguous", "zigzag", "document-zigzag", "by-work")
    masks: tuple[str, ...] = ("full", "causal", "causal-document")
    lengths: tuple[int, ...] = (4096,)
    ranks: tuple[int, ...] = (2, 4)
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    dtype: str = "float32"
    documents: str = "short"
    repeats: int = 3
    seed: int = 0
    timeout: float = 600.0

    def check(self) -> None:
        """Refuse what can't be run, before anything is.

        Raises:
            InputError: sizes below 1, or names that aren't known.
        """
        check_sizes(lengths=self.lengths, ranks=self.ranks, repeats=(self.repeats,))
        check_sizes(heads=(self.heads,), kv_heads=(self.kv_heads,), head_dim=(self.head_dim,))
        if self.heads % self.kv_heads:
            raise InputError(f"--kv-heads {self.kv_heads} doesn't divide --heads {self.heads}.")
        check_known("dtype", (self.dtype,), DTYPES)
        check_known("documents", (self.documents,), distributions())
        check_known("mask", self.masks, names())
        for scheme in self.schemes:
            scheme_of(scheme)
        for sharding in self.shardings:
            sharding_of(sharding, 4096, 1)

    def cells(self) -> list[Cell]:
        """Every group of processes."""
        return [Cell(m, n, r) for m in self.masks for n in self.lengths for r in self.ranks]


def run_bench(
    options: Options, records: Records | None = None, begin: Begin | None = None
) -> list[dict[str, Any]]:
    """Measure; {"cell", "values"} of every cell."""
    options.check()
    how = {k: v for k, v in asdict(options).items() if k not in ("masks", "lengths", "ranks")}
    return run_cells("parallel", options.cells(), how, _measure(options), records, begin)


def _measure(options: Options) -> Callable[[Cell], dict[str, Any]]:
    def measure(cell: Cell) -> dict[str, Any]:
        contestants = tuple((c, s) for c in options.schemes for s in options.shardings)
        task = Task(
            cell.mask, cell.length, options.heads, options.kv_heads, options.head_dim,
            options.dtype, contestants, options.documents, options.repeats, options.seed,
        )  # fmt: skip
        ranks = [f"rank-{r}" for r in range(cell.ranks)]
        try:
            found = run(rank_of, ranks, (task,), timeout=options.timeout)
        except RanksError as error:
            return {"failed": told(error), "results": []}
        every = [found[name] for name in ranks]
        base = every[0][0]
        alone = median(base["cpu"])
        results = [_together([one[i] for one in every], alone) for i in range(1, len(every[0]))]
        return {"alone": {"cpu": base["cpu"], "wall": base["wall"]}, "results": results}

    return measure


def _together(ranks: list[dict[str, Any]], alone: float) -> dict[str, Any]:
    """One contestant's result from those of its ranks."""
    first = ranks[0]
    result: dict[str, Any] = {"scheme": first["scheme"], "sharding": first["sharding"]}
    refused = [r["refused"] for r in ranks if "refused" in r]
    if refused:
        return result | {"refused": refused[0]}
    right = all(r["right"] for r in ranks)
    result |= {
        "right": right,
        "error": max(r["error"] for r in ranks),
        "sent": {d: [r["sent"][d] for r in ranks] for d in ("forward", "backward")},
        "theory": {d: [r["theory"][d] for r in ranks] for d in ("forward", "backward")},
        "bytes": max(r["bytes"] for r in ranks),
        "imbalance": first["imbalance"],
        "area_imbalance": first["area_imbalance"],
        "first_seconds": max(r["first_seconds"] for r in ranks),
        "peak_bytes": max((r["peak_bytes"] or 0 for r in ranks), default=0) or None,
    }
    if right:  # a speed of something wrong says nothing
        cpu = [max(x) for x in zip(*(r["cpu"] for r in ranks))]
        result |= {
            "wall": [max(x) for x in zip(*(r["wall"] for r in ranks))],
            "cpu": cpu,
            "speed_up": alone / median(cpu),
        }
    return result


def exact(result: dict[str, Any]) -> bool:
    """Whether all ranks together sent what the formulas say, to the number."""
    off = [abs(sum(result["sent"][d]) - sum(result["theory"][d])) for d in ("forward", "backward")]
    return all(x < 1e-6 for x in off)


def every_result(found: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(cell, result) of everything that ran."""
    for one in found:
        for result in one["values"]["results"]:
            yield one["cell"], result


def lines(found: list[dict[str, Any]]) -> list[str]:
    """What the results come to, in sentences."""
    ran = [(c, r) for c, r in every_result(found) if "refused" not in r]
    wrong = [f"{r['scheme']} {r['sharding']} on {c['mask']}" for c, r in ran if not r["right"]]
    said = [f"{len(ran)} results; {len(ran) - len(wrong)} equal one rank's, output and gradients."]
    if wrong:
        said.append(f"WRONG: {'; '.join(wrong)}.")
    unlike = [f"{r['scheme']} {r['sharding']} on {c['mask']}" for c, r in ran if not exact(r)]
    said.append(
        "What they sent is what the formulas say, to the number."
        if not unlike
        else f"What they sent differs from the formulas: {'; '.join(unlike)}."
    )
    for mask in dict.fromkeys(c["mask"] for c, _ in ran):
        best: dict[str, list[float]] = {}
        for c, r in ran:
            if c["mask"] == mask:
                best.setdefault(r["sharding"], []).append(r["imbalance"])
        parts = ", ".join(f"{name} {max(x):.2f}" for name, x in best.items())
        said.append(f"{mask}: busiest rank over mean, by sharding: {parts}.")
    for one in found:
        if "failed" in one["values"]:
            said.append(f"{one['cell']['mask']}: failed: {one['values']['failed']}")
    return said
