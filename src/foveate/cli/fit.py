"""`foveate fit`: what a method learns on a frozen model, made once and found by `foveate.use`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveate.cli.progress import Screen, console
from foveate.ops.errors import MissingPackageError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("fit")(fit)


def fit(
    method: Annotated[
        str, typer.Option("--method", "-m", help='Such as dhsa, or "flux(local=512)".')
    ],
    model: Annotated[
        str | None, typer.Argument(help="A folder, hub id or demo model. Default: smollm2.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A text file. Default: WikiText-2's test split, shipped.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences in each step.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    out: Annotated[
        str | None, typer.Option(help="File of the artefact. Default: where foveate.use looks.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew, also where a finished one is there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Learn what a method needs to know of a model, whose weights stay as they are.

    Stopped at any moment, the same command goes on. Afterwards foveate.use(model, method) and
    foveate compare find what was learnt by the model's weights.
    """
    from foveate.compare.options import parse_device
    from foveate.runs.text import load_text

    try:
        from foveate.hf.fit import job
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in {"transformers", "safetensors"}:
            raise
        raise MissingPackageError(f"foveate fit needs {name}: pip install 'foveate[hf]'") from error
    found = load_text(text)
    made = job.Job(
        model, method, (found.title, found.content), length, batch, parse_device(device),
        None if out is None else Path(out).expanduser(), fresh,
    )  # fmt: skip
    with Screen() as screen:
        screen.begin(f"fitting {method}", 100)
        facts = job.run(made, lambda share, doing: screen.advance(100 * share, doing), screen.say)
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    else:
        show(facts, console())


def show(found: dict[str, Any], screen: Console) -> None:
    """The figures for people, and the line of Python that uses it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("model", found["model"])
    table.add_row("text", found["text"])
    held = found["facts"].get("held_out", {})
    for name, value in held.items():
        table.add_row(name.replace("_", " "), f"{value:.3g}")
    table.add_row("artefact", found["path"] + (" (was there already)" if found["found"] else ""))
    screen.print(table)
    screen.print(Text(f"\nfoveate.use(model, {found['key']!r})"), soft_wrap=True)
