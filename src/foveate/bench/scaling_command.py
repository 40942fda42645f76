"""`foveate bench scaling`: options, table and figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from foveate.bench.figure import new_figure, save
from foveate.bench.screen import close, numbers, print_json, run_job, screen
from foveate.ops.errors import MissingPackageError

Found = dict[str, Any]


def scaling(
    methods: Annotated[
        str | None,
        typer.Option(
            help="Attentions and mixers by key, or with hyper-parameters, in which {n}, {root} and "
            "{rest} stand for the length, about its square root, and their ratio. Default: the "
            "sparse ones that are trained, and dense attention."
        ),
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens, such as 1024,4096,16384.")] = None,
    dim: Annotated[int, typer.Option(help="Width of the layer.")] = 128,
    heads: Annotated[int, typer.Option(help="Heads of the layer.")] = 2,
    both_ways: Annotated[
        bool, typer.Option("--both-ways", help="Without a mask; otherwise causal.")
    ] = False,
    threads: Annotated[str, typer.Option(help="Threads of torch, such as 1,2.")] = "1",
    limit: Annotated[
        float, typer.Option(help="Seconds of a call above which a method isn't run longer.")
    ] = 60.0,
    repeats: Annotated[int, typer.Option(help="Rounds of each cell.")] = 3,
    clock: Annotated[str, typer.Option(help="wall, or cpu: processor time.")] = "wall",
    seed: Annotated[int, typer.Option(help="Of weights and inputs.")] = 0,
    out: Annotated[
        str, typer.Option(help="Folder for results.jsonl and the figure.")
    ] = "foveate-report/bench",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Put earlier results aside, measure anew.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short lengths; options still count.")
    ] = False,
) -> None:
    """How the cost of a forward and backward grows with length, by method, beside theory.

    Counted: operations of attention and of matrix products, and numbers that everything else
    writes. Stopped at any moment, it goes on from there when it's started again.
    """
    from foveate.bench import scaling as job
    from foveate.methods import split
    from foveate.runs.timing import Pace

    base = job.Options(lengths=(256, 512, 1024)) if quick else job.Options()
    options = job.Options(
        methods=tuple(split(methods)) if methods else job.known(base.methods),
        lengths=numbers("--lengths", lengths) or base.lengths,
        dim=dim,
        heads=heads,
        both_ways=both_ways,
        threads=numbers("--threads", threads),
        limit=limit,
        pace=Pace(repeats=repeats, clock=clock),
        seed=seed,
    )
    found = run_job(lambda *where: job.run(options, *where), out, fresh)
    fits = job.fits(found)
    lines = [_line(fit) for fit in fits]
    path: Path | None = Path(out) / "scaling.png"
    try:
        scaling_figure(found, fits, Path(out) / "scaling.png")
    except MissingPackageError as error:
        lines.append(str(error))
        path = None
    if as_json:
        print_json([*found, *({"fit": fit} for fit in fits)], lines)
        return
    console = screen()
    console.print(scaling_table(found))
    console.print()
    close(console, lines, [Path(out) / "results.jsonl", path])


def _line(fit: Found) -> str:
    theory = "?" if fit["theory"] is None else f"{fit['theory']:g}"
    named = {"flops": "operations", "numbers": "numbers written", "seconds": "seconds"}
    parts = [f"{what} n^{_number(fit[name])}" for name, what in named.items()]
    return f"{fit['method']}: theory n^{theory}; measured {', '.join(parts)}"


def _number(fitted: dict[str, float | None]) -> str:
    whole, tail = fitted["exponent"], fitted["tail"]
    if whole is None:
        return "?"
    return f"{whole:.2f}" + ("" if tail is None else f" ({tail:.2f} in the longer half)")


def scaling_table(found: list[Found]) -> Table:
    """A line for each cell."""
    table = Table(box=None, pad_edge=False)
    table.add_column("method", overflow="fold")
    for name in ("tokens", "threads", "GFLOP", "numbers", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for one in found:
        cell, values = one["cell"], one["values"]
        row = [cell["text"], str(cell["length"]), str(cell["threads"])]
        if "seconds" in values:
            row += [f"{values['flops'] / 1e9:.3f}", f"{values['numbers']:.2e}",
                    f"{values['seconds']['median'] * 1e3:.1f}"]  # fmt: skip
        else:
            row += ["-"] * 3
        remark = values.get("failed", values.get("skipped", ""))
        table.add_row(*row, Text(remark, style="red" if "failed" in values else "dim"))
    return table


def scaling_figure(found: list[Found], fits: list[Found], path: Path) -> Path:
    """Operations and seconds over length, both logarithmic, with the fitted exponents.

    Raises:
        MissingPackageError: matplotlib isn't there.
    """
    figure, axes = new_figure(1, 2, (11, 4.6))
    for axis, name, label in (
        (axes[0][0], "flops", "counted operations, forward and backward"),
        (axes[0][1], "seconds", "seconds, forward and backward"),
    ):
        for fit in fits:
            points = []
            for one in found:
                same = (one["cell"]["method"], one["cell"]["threads"])
                if same == (fit["method"], fit["threads"]) and "seconds" in one["values"]:
                    value = one["values"][name]
                    cost = value["median"] if isinstance(value, dict) else value
                    points.append((one["cell"]["length"], cost))
            x, y = zip(*sorted(points))
            exponent, theory = fit[name]["exponent"], fit["theory"]
            text = f"{fit['method']} n^{exponent:.2f}" if exponent is not None else fit["method"]
            text += "" if theory is None else f" (theory {theory:g})"
            axis.plot(x, y, marker="o", markersize=3, label=text)
        axis.set(xlabel="tokens", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        if axis.lines:
            axis.legend(fontsize=7)
    save(figure, path)
    return path
