"""`foveate bench video`: options and table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from foveate.bench.screen import close, numbers, print_json, run_job, screen
from foveate.ops.errors import InputError


def video(
    methods: Annotated[
        str | None,
        typer.Option(
            help="Attentions with their blocks, such as "
            '"vmoba(frames=1, tile=(8, 8), box=(4, 8, 8))". Default: VMoBA, and Rectified SpaAttn '
            "with and without its rectification."
        ),
    ] = None,
    size: Annotated[str, typer.Option(help="Frames x height x width, in tokens.")] = "8x32x32",
    model: Annotated[
        str | None,
        typer.Option(help="Folder of foveate denoise. Default: one is trained in minutes."),
    ] = None,
    steps: Annotated[
        str, typer.Option(help="Of that training: on half of each side, on the whole grid.")
    ] = "300,10",
    threads: Annotated[str, typer.Option(help="Threads of torch, such as 1,2.")] = "1",
    repeats: Annotated[int, typer.Option(help="Paired rounds of each layer.")] = 5,
    clock: Annotated[str, typer.Option(help="wall, or cpu: processor time.")] = "wall",
    seed: Annotated[int, typer.Option(help="Of the model and the clip.")] = 0,
    out: Annotated[str, typer.Option(help="Folder for results.jsonl.")] = "foveate-report/bench",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Put earlier results aside, measure anew.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small grid and few steps; options still count.")
    ] = False,
) -> None:
    """A video transformer's attention by chosen blocks, against dense, at 8,192 tokens and more.

    "of ideal" is the speed over that of visited tiles alone, choosing included; "off" the relative
    error of a layer's output, and of the predicted clip if all layers are replaced.
    """
    from foveate.bench import video as job
    from foveate.methods import split
    from foveate.runs.timing import Pace

    sides = _whole("--size", size, "x", 3, "8x32x32")
    if quick and size == "8x32x32":
        sides = (4, 16, 16)
    pair = _whole("--steps", steps, ",", 2, "300,10")
    options = job.Options(
        methods=tuple(split(methods)) if methods else job.METHODS,
        sizes=(sides[0], sides[1], sides[2]),
        model=model,
        steps=(10, 2) if quick and steps == "300,10" else (pair[0], pair[1]),
        threads=numbers("--threads", threads) or (1,),
        pace=Pace(repeats=3 if quick else repeats, clock=clock),
        seed=seed,
    )
    options.check()
    found = run_job(lambda *where: job.run(options, *where), out, fresh)
    if as_json:
        print_json(found, [])
        return
    console = screen()
    console.print(video_table(found))
    console.print()
    close(console, [], [Path(out) / "results.jsonl"])


def _whole(name: str, text: str, between: str, count: int, such_as: str) -> tuple[int, ...]:
    parts = text.split(between)
    if len(parts) != count or not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"{name} {text!r}: expected {count} whole numbers, such as {such_as}.")
    return tuple(int(part) for part in parts)


def video_table(found: list[dict[str, Any]]) -> Table:
    """A line for each method: means over layers."""
    table = Table(box=None, pad_edge=False)
    table.add_column("method", overflow="fold")
    heads = (
        "tokens",
        "threads",
        "density",
        "off",
        "model off",
        "ideal",
        "times faster",
        "of ideal",
    )
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for one in found:
        cell, values = one["cell"], one["values"]
        row = [cell["method"], str(values["tokens"]), str(cell["threads"]),
               f"{values['density']:.3f}", f"{values['off']:.3f}",
               f"{values['model_off']:.4f}"]  # fmt: skip
        if "times_faster" in values:
            ideal, faster = values["ideal"], values["times_faster"]
            row += [f"{ideal:.2f}", f"{faster:.2f}", f"{faster / ideal:.2f}"]
        else:
            row += ["-"] * 3
        failed = [layer["failed"] for layer in values["layers"] if "failed" in layer]
        table.add_row(*row, Text("; ".join(failed), style="red"))
    return table
