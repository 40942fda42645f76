"""The Long-Context Attention Benchmark: what time follows, who balances, which scheme scales.

Kernel: 4,096 tokens, 2 heads of 64, fp32, one thread, processor time; ten masks in turns, tiles of
128. Ten seeds: with three, the rate of document masks over that of full ones was inconclusive (0.80
to 0.92 where at most 0.9 is asked). Time follows the tiles that are visited, so that useful
operations per second fall where tiles are partly empty. Balance: causal documents of log-normal
lengths in 65,536 tokens on 8 ranks, ten draws for each seed; the busiest rank's pairs over the
mean. Zig-zag, which balances one document, doesn't balance packed ones. Striped shares are even in
pairs; their visited tiles are counted beside. Schemes: all of them on four ranks (threads of this
process), fp64, against the reference on one; what they send, against the formulas. Plan: `foveate
cost context`'s model at 8,192 tokens a rank, 64 query heads on 8 key heads of 128, bf16, 400
TFLOP/s, 200 GB/s in machines of 8 and 25 GB/s between them: counted, so no seed changes it.
"""

from __future__ import annotations

import math
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from foveate.papers.harness import Check, Found, Paper, Trial, at_least, at_most
from foveate.papers.harness import ratio as times

MASKS = (
    "full", "causal", "full-document", "causal-document", "sliding", "causal-sliding",
    "shared-question", "global-sliding", "prefix-causal", "block-causal-document",
)  # fmt: skip
SHARDINGS = ("contiguous", "zigzag", "document zigzag", "striped", "by work")
LENGTHS = {"short": "short", "medium": "medium", "long": "long", "one document": None}
SCHEMES = (
    "ring", "ring(window=2)", "all-gather", "ulysses", "usp(ulysses=2)",
    "loongtrain(ulysses=2, window=2)", "magi(stages=2)",
)  # fmt: skip
RANKS, TOKENS, DRAWS = 8, 65_536, 10
PLANNED = (8, 16, 32, 64, 96)


def run(trial: Trial) -> Found:
    """One of the four cells."""
    return {"kernel": kernel, "balance": balance, "schemes": schemes, "plan": plan}[trial.cell](
        trial
    )


@torch.no_grad()
def kernel(trial: Trial) -> Found:
    """Microseconds for each visited tile, and useful GFLOP/s, by mask."""
    from foveate.ops import attention
    from foveate.parts.longcontext import FIXED, draw_documents, settings
    from foveate.runs.timing import Pace, race

    n, tile, heads, dim = 1024 if trial.quick else 4096, 128, 2, 64
    random = torch.Generator().manual_seed(trial.seed)
    q, k, v = torch.randn(3, 1, heads, n, dim, generator=random).unbind(0)
    s = settings(draw_documents(n, "short", trial.seed))
    layouts = {name: FIXED[name](s).layout(n, n, tile) for name in MASKS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trial.tell(0.0, "ten masks in turns")
        calls = {
            name: lambda x=layout: attention(q, k, v, layout=x) for name, layout in layouts.items()
        }
        samples = race(calls, Pace(repeats=3 if trial.quick else 9, clock="cpu"))
    finally:
        torch.set_num_threads(threads)
    found: dict[str, dict[str, Any]] = {}
    for name, layout in layouts.items():
        seconds = median(samples[name].cpu)
        visited = layout.cols.numel()
        found[name] = {
            "tiles": float(visited),
            "microseconds": seconds * 1e6,
            "microseconds a tile": seconds * 1e6 / visited,
            "GFLOP/s": layout.flops(1, heads, dim) / seconds / 1e9,
        }
    return found


def balance(trial: Trial) -> Found:
    """Busiest rank over mean, by sharding and lengths; tiles that striped shares visit."""
    from foveate.ops import causal, documents
    from foveate.parallel.context import balance as balanced
    from foveate.parallel.context import by_work, contiguous, document_zigzag, striped, zigzag
    from foveate.parts.longcontext import draw_documents, row_counts, settings

    n = TOKENS // 8 if trial.quick else TOKENS
    found: dict[str, dict[str, Any]] = {name: {} for name in SHARDINGS}
    for number, (kind, distribution) in enumerate(LENGTHS.items()):
        trial.tell(number / len(LENGTHS), kind)
        uneven: dict[str, list[float]] = {name: [] for name in SHARDINGS}
        for draw in range(2 if trial.quick else DRAWS):
            bounds = (
                (0, n) if distribution is None
                else draw_documents(n, distribution, 1000 * trial.seed + draw)
            )  # fmt: skip
            work = row_counts("causal-document", settings(bounds))
            made = {
                "contiguous": contiguous(n, RANKS),
                "zigzag": zigzag(n, RANKS),
                "document zigzag": document_zigzag(bounds, RANKS),
                "striped": striped(n, RANKS),
                "by work": by_work(work, RANKS, 64 if trial.quick else 512),
            }
            for name, sharding in made.items():
                loads = [float(work[i].sum()) for i in sharding.index]
                uneven[name].append(max(loads) / mean(loads))
            if draw == 0 and kind == "short":
                mask = causal() & documents(bounds)
                for name in ("document zigzag", "striped"):
                    area = balanced(mask, made[name], 128).area
                    found[name]["tiles of 128 visited"] = sum(area) / 128**2
            if distribution is None:
                break
        for name in SHARDINGS:
            found[name][f"imbalance, {kind}"] = mean(uneven[name])
    return found


def _cast(seen: Tensor, index: list[Tensor], each: int) -> list[int]:
    """Numbers that each rank sends by group-cast, from the mask's elements.

    A run of a rank's tokens goes to every other rank that sees some of it: forward, again in the
    backward, and its gradient comes back from there. each: numbers of a token.
    """
    travel = torch.zeros(len(index), len(index), dtype=torch.int64)  # tokens, from whom to whom
    for source, mine in enumerate(index):
        cuts = [0, *(mine.diff() != 1).nonzero()[:, 0].add(1).tolist(), len(mine)]
        for low, high in zip(cuts, cuts[1:]):
            for reader, rows in enumerate(index):
                some = bool(seen[rows][:, mine[low:high]].any())
                travel[source, reader] += (high - low) * (some and source != reader)
    sent: list[int] = ((2 * travel.sum(1) + travel.sum(0)) * each).tolist()
    return sent


def schemes(trial: Trial) -> Found:
    """Largest error of output and gradients of each scheme, and numbers sent over the formulas'."""
    from foveate.ops import attention, causal, documents
    from foveate.parallel.context import ContextParallel, Links, Sizes, run_local, volume

    n, ranks, heads, kv_heads, dim = 192, 4, 4, 2, 16
    random = torch.Generator().manual_seed(trial.seed)
    q, k, v, dout = (
        torch.randn(1, h, n, dim, generator=random, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    mask = causal() & documents([0, 50, 51, 130, n])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(leaves[0], leaves[1], leaves[2], mask, backend="reference").out
    right = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    sizes = Sizes(n, ranks, heads, kv_heads, dim, dim)
    index = run_local(
        ranks, lambda links: ContextParallel(links, "magi", "zigzag").sequence(n, mask).index
    )
    cast = _cast(mask.dense(n, n)[0, 0], index, kv_heads * 2 * dim)
    found: dict[str, dict[str, Any]] = {}
    for number, scheme in enumerate(SCHEMES):
        trial.tell(number / len(SCHEMES), scheme)

        def work(links: Links, scheme: str = scheme) -> tuple[float, float]:
            cp = ContextParallel(links, scheme, "zigzag")
            sequence = cp.sequence(n, mask)
            own = [sequence.split(x, 2).requires_grad_() for x in (q, k, v)]
            got = sequence.attention(*own).out
            grads = torch.autograd.grad(got, own, sequence.split(dout, 2))
            off = [
                (a.detach() - sequence.split(b, 2)).abs().max()
                for a, b in zip((got, *grads), right)
            ]
            if scheme.startswith("magi"):
                theory = float(cast[links.rank])
            else:
                told = volume(cp.scheme, sizes, sequence.plan, links.rank)
                theory = float(sum(told.forward.values()) + sum(told.backward.values()))
            return float(torch.stack(off).max()), sum(cp.traffic.numbers.values()) / theory

        results = run_local(ranks, work)
        found[scheme] = {
            "error": float(torch.tensor([e for e, _ in results], dtype=torch.float64).max()),
            "sent over theory": max((sent for _, sent in results), key=lambda x: abs(x - 1)),
        }
    return found


def plan(trial: Trial) -> Found:
    """Milliseconds of the best ring and the best hybrid, nothing overlapped, by ranks."""
    from foveate.cost.context import Machine, candidates, cost, loads
    from foveate.parallel.context import Sizes, zigzag
    from foveate.parts.longcontext import row_counts, settings

    machine = Machine(400e12, 200e9, 25e9)
    found: dict[str, dict[str, Any]] = {"best ring": {}, "best hybrid": {}}
    per_rank = 512 if trial.quick else 8192
    for number, ranks in enumerate(PLANNED):
        trial.tell(number / len(PLANNED), f"{ranks} ranks")
        n = per_rank * ranks
        pairs = loads(row_counts("causal", settings((0, n))), zigzag(n, ranks))
        sizes = Sizes(n, ranks, 64, 8, 128, 128)
        for kind in found:
            which = ("ring", "all-gather") if kind == "best ring" else ("usp", "loongtrain")
            names = [c for c in candidates(ranks, 64, 8) if c.startswith(which)]
            made = [cost(name, sizes, pairs, machine) for name in names]
            found[kind][f"sending ms, {ranks} ranks"] = 1e3 * min(c.exchange for c in made)
            found[kind][f"ms apart, {ranks} ranks"] = 1e3 * min(c.apart for c in made)
    return found


def _spread(at: Found) -> float:
    each = [at[name]["microseconds a tile"] for name in MASKS]
    return max(each) / min(each) - 1


def _correlation(at: Found) -> float:
    pair = torch.tensor([[at[n]["tiles"], at[n]["microseconds"]] for n in MASKS])
    return float(torch.corrcoef(pair.double().T)[0, 1])


def _balanced(sharding: str, kind: str, most: float) -> Check:
    metric = f"imbalance, {kind}"
    return at_most(f"{metric}: {sharding}", lambda at: at[sharding][metric], most)


def _unbalanced(sharding: str, kind: str, least: float) -> Check:
    metric = f"imbalance, {kind}"
    return at_least(f"{metric}: {sharding}", lambda at: at[sharding][metric], least)


def _right(scheme: str) -> tuple[Check, Check]:
    """Exact, and sending what the formulas say."""
    off = f"|sent / theory - 1|: {scheme}"
    return (
        at_most(f"error: {scheme}", lambda at: at[scheme]["error"], 1e-12),
        at_most(off, lambda at: abs(at[scheme]["sent over theory"] - 1), 0.0, exact=True),
    )


PACKED = ("short", "medium", "long")
PAPER = Paper(
    key="longca-bench",
    claim="Attention's time follows the blocks that it visits, so that document masks have the "
    "lowest rate of useful operations; shares that balance one sequence don't balance packed ones; "
    "hybrids of heads and rings scale best, and Ulysses' volume beats a ring's with few key heads.",
    metric="processor time for each visited tile; busiest rank's pairs over the mean; error in "
    "fp64; planned milliseconds",
    cells=("kernel", "balance", "schemes", "plan"),
    run=run,
    seeds=tuple(range(10)),
    baseline=("full", "contiguous", "zigzag", "best ring"),
    ours=(*MASKS[1:], "document zigzag", "striped", "by work", *SCHEMES, "best hybrid"),
    checks=(
        at_most("microseconds a tile: largest / smallest - 1", _spread, 0.25, refuted=math.inf),
        at_least("correlation of time with tiles", _correlation, 0.97, refuted=0.5),
        at_most(
            "GFLOP/s: causal-document / full",
            lambda at: at["causal-document"]["GFLOP/s"] / at["full"]["GFLOP/s"],
            0.9,
            refuted=1.0,
        ),
        _balanced("zigzag", "one document", 1.01),
        *(_unbalanced("zigzag", kind, 1.4) for kind in PACKED),
        *(
            _balanced(name, kind, 1.05)
            for name in ("document zigzag", "by work") for kind in PACKED
        ),
        *(check for name in SCHEMES for check in _right(name)),
        *(times("best ring", "best hybrid", 1.0, f"ms apart, {ranks} ranks", exact=True)
          for ranks in PLANNED if ranks > 16),
    ),
    alone=("kernel",),
)  # fmt: skip
