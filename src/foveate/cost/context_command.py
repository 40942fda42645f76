"""`foveate cost context`: options and table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from foveate.ops.errors import InputError, nearest


def context(
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, such as 8,96,1024.")] = "8,96,1024",
    per_rank: Annotated[int, typer.Option(help="Tokens on each rank.")] = 8192,
    length: Annotated[
        int | None, typer.Option(help="Tokens of the sequence, in place of --per-rank.")
    ] = None,
    mask: Annotated[
        str, typer.Option(help="Of the catalogue, such as causal or causal-document.")
    ] = "causal",
    documents: Annotated[
        str, typer.Option(help="Document lengths: short, medium, long, mix.")
    ] = "mix",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 64,
    kv_heads: Annotated[int, typer.Option(help="Key heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Of keys and of values.")] = 128,
    sharding: Annotated[
        str, typer.Option(help="contiguous, zigzag, document-zigzag, striped, by-work(512).")
    ] = "document-zigzag",
    schemes: Annotated[
        str | None, typer.Option(help='By semicolons: "ring; usp(ulysses=8)". Default: all.')
    ] = None,
    rate: Annotated[float, typer.Option(help="Useful TFLOP/s of one rank on this mask.")] = 400.0,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take the rate of this machine's CPU, measured now.")
    ] = False,
    measured: Annotated[
        str | None, typer.Option(help="Take the rate from results of foveate bench kernels.")
    ] = None,
    inside: Annotated[float, typer.Option(help="GB/s that a rank sends in its machine.")] = 200.0,
    between: Annotated[float, typer.Option(help="GB/s that it sends to another machine.")] = 25.0,
    node: Annotated[int, typer.Option(help="Ranks of a machine.")] = 8,
    itemsize: Annotated[int, typer.Option(help="Bytes of a number.")] = 2,
    backward: Annotated[bool, typer.Option("--backward", help="Forward and backward.")] = False,
    seed: Annotated[int, typer.Option(help="Of the documents.")] = 0,
    most: Annotated[int, typer.Option(help="Schemes shown for each number of ranks.")] = 6,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time of one attention over many ranks, scheme by scheme, from rates and formulas.

    "apart" is without any overlap of computing and sending, "together" with all of it; the truth
    lies between. Efficiency is the speed-up over one rank with everything, by ranks.
    """
    if measure and measured is not None:
        raise InputError("--measure and --measured both tell the rate; give one.")
    speed: float | None = rate * 1e12
    if measured is not None:
        from foveate.cost.context import rate_in

        speed = rate_in(Path(measured), mask)
    rows = planned(
        _numbers(ranks), per_rank, length, mask, documents, heads, kv_heads, head_dim, sharding,
        None if schemes is None else [s.strip() for s in schemes.split(";")],
        None if measure else speed, inside * 1e9, between * 1e9, node, itemsize, backward,
        seed,
    )  # fmt: skip
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(_table(rows, most))


def planned(
    ranks: list[int],
    per_rank: int,
    length: int | None,
    mask: str,
    documents: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    sharding: str,
    schemes: list[str] | None,
    rate: float | None,
    inside: float,
    between: float,
    node: int,
    itemsize: int,
    backward: bool,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows as JSON, fastest first for each number of ranks; rate None measures it here.

    Raises:
        InputError: sizes that don't fit, or names that aren't known.
    """
    from foveate.cost.context import Machine, candidates, cost, loads, measured_rate
    from foveate.parallel.context import Sizes, scheme_of
    from foveate.parts.longcontext import counted, draw_documents, row_counts, settings

    for name, number in (("--heads", heads), ("--kv-heads", kv_heads), ("--head-dim", head_dim),
                         ("--per-rank", per_rank), ("--ranks", min(ranks, default=0))):  # fmt: skip
        if number < 1:
            raise InputError(f"{name}: expected at least 1, got {number}.")
    if heads % kv_heads:
        raise InputError(f"--kv-heads {kv_heads} doesn't divide --heads {heads}.")
    if mask not in counted():
        raise InputError(f"--mask {mask} is not known here; {nearest(mask, counted())}")
    rate = measured_rate(head_dim) if rate is None else rate
    machine = Machine(rate, inside, between, node, itemsize)
    rows = []
    for n in ranks:
        tokens = per_rank * n if length is None else length
        s = settings(draw_documents(tokens, documents, seed))
        work = row_counts(mask, s)
        shared = _shared_out(sharding, s, n, work, mask)
        sizes = Sizes(tokens, n, heads, kv_heads, head_dim, head_dim)
        pairs = loads(work, shared)
        uneven = max(pairs) * n / sum(pairs)
        found = []
        for scheme in schemes or candidates(n, heads, node):
            scheme_of(scheme).check(n, heads)
            row = cost(scheme, sizes, pairs, machine, backward=backward).row()
            found.append({"tokens": tokens, "mask": mask, "imbalance": uneven, **row})
        rows += sorted(found, key=lambda row: row["seconds_apart"] + row["seconds_together"])
    return rows


def _shared_out(sharding: str, s: Any, ranks: int, work: Any, mask: str) -> Any:
    from foveate.parallel.context import by_work, document_zigzag, sharding_of

    if sharding == "document-zigzag":
        packed = "document" in mask or mask in ("shared-question", "causal-blockwise")
        return document_zigzag(s.bounds if packed else [0, s.length], ranks)
    if sharding.startswith("by-work"):
        digits = "".join(c for c in sharding if c.isdecimal())
        return by_work(work, ranks, int(digits or 512))
    return sharding_of(sharding, s.length, ranks)


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise InputError(f"--ranks {text!r}: expected numbers such as 8,96,1024.")
    return [int(part) for part in parts]


def _table(rows: list[dict[str, Any]], most: int) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("ranks", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("scheme", overflow="fold")
    for name in ("busiest", "compute ms", "sending ms", "MiB sent", "MiB held", "ms together",
                 "ms apart", "efficiency"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    shown: dict[int, int] = {}
    for row in rows:
        n = row["ranks"]
        shown[n] = shown.get(n, 0) + 1
        if shown[n] > most:
            continue
        first = shown[n] == 1
        table.add_row(
            str(n) if first else "", f"{row['tokens']:,}" if first else "", row["scheme"],
            f"{row['imbalance']:.2f}", f"{row['compute_seconds'] * 1e3:.2f}",
            f"{row['exchange_seconds'] * 1e3:.2f}", f"{row['sent_bytes'] / 2**20:.0f}",
            f"{row['held_bytes'] / 2**20:.0f}", f"{row['seconds_together'] * 1e3:.2f}",
            f"{row['seconds_apart'] * 1e3:.2f}",
            f"{row['efficiency_apart']:.0%}-{row['efficiency_together']:.0%}",
            style="bold" if first else None,
        )  # fmt: skip
    return table
