"""`foveate inspect`: what the heads of a model do, and a pattern for each of them."""

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
    app.command("inspect")(inspect)


def inspect(
    model: Annotated[
        str | None, typer.Argument(help="A folder, hub id or demo model. Default: smollm2.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A UTF-8 file to look at. Default: WikiText-2, shipped.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 4096,
    windows: Annotated[int, typer.Option(help="Windows, spread over the text.")] = 1,
    candidates: Annotated[
        str | None,
        typer.Option(
            help="Patterns that heads choose from, as --methods of compare takes them. Default: "
            "windows with sinks, and vertical and slash lines, in several sizes."
        ),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(help="Of the suggestion: mean share of dense attention's tiles."),
    ] = 0.3,
    near: Annotated[int, typer.Option(help="Tokens up to which a key is local.")] = 128,
    sinks: Annotated[int, typer.Option(help="First tokens that count as the sink.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU.")] = None,
    out: Annotated[str, typer.Option(help="Folder for the report.")] = "foveate-inspect",
    fresh: Annotated[bool, typer.Option("--fresh", help="Put earlier results aside.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Look into a model's attention: sinks, massive activations, what each head does and needs.

    By layer and head: sink rates, values and activations at the sink, entropy, locality, effective
    rank, density, likeness of layers; and which pattern fits each head within a budget. Writes
    report.html with a map of every head, inspect.json, and suggestion.json, which foveate compare
    and foveate.use take as by-head(file=...). Stopped at any moment, the same command goes on.
    """
    from foveate.compare.options import parse_device
    from foveate.runs.heads import Wanted
    from foveate.runs.text import load_text

    try:
        import matplotlib  # noqa: F401

        from foveate.lens import job
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        extra = {"matplotlib": "report"}.get(name, "hf")
        if name not in {"transformers", "safetensors", "matplotlib"}:
            raise
        raise MissingPackageError(
            f"foveate inspect needs {name}: pip install 'foveate[{extra}]'"
        ) from error
    made = job.Job(
        model, load_text(text), Path(out).expanduser(), length, windows, candidates, budget,
        Wanted(sinks=sinks, near=near), parse_device(device), threads, fresh,
    )  # fmt: skip
    with Screen() as screen:
        screen.begin("inspecting", 100)
        facts = job.run(made, lambda done, doing: screen.advance(100 * done, doing), screen.say)
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    else:
        show(facts, console())


def show(facts: dict[str, Any], screen: Console) -> None:
    """A line for each layer, and what to do next."""
    from foveate.lens.report import sentence

    table = Table(box=None, pad_edge=False)
    for name in (
        "layer", "sink", "no-op", "entropy", "local", "95% of mass", "rank", "drain", "largest |x|",
        "patterns",
    ):  # fmt: skip
        table.add_column(name, justify="left" if name == "patterns" else "right", no_wrap=True)
    figures, made = facts["figures"], facts["suggestion"]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    for layer in map(str, facts["layers"]):
        states = facts["states"][layer]
        table.add_row(
            layer,
            f"{mean(figures['importance'][layer]):.2f}",
            f"{mean(figures['no_op'][layer]):.2f}",
            f"{mean(figures['entropy'][layer]):.2f}",
            f"{mean(figures['near'][layer]):.2f}",
            f"{100 * mean(facts['density']['0.95'][layer]):.1f}%",
            f"{mean(figures['output_rank'][layer]):.1f}",
            f"{mean(figures['drain'][layer]):.2f}",
            "" if states is None else f"{states['largest']:,.0f}{'*' * bool(states['massive'])}",
            _short(made["heads"][layer]),
        )
    screen.print(table)
    screen.print(
        Text("Means over heads; * holds massive activations (see the report).", style="dim")
    )
    rates = facts["segments"]["rates"]
    if rates:
        said = ", ".join(f"{100 * one[0]:.1f}% at {eps}" for eps, one in rates.items())
        screen.print(Text(f"Sink rate of the first token: {said}."))
    screen.print(Text("\n" + sentence(facts), style="bold"), soft_wrap=True)
    screen.print(Text(f"\n{made['compare']}\n{made['use']}\n"), soft_wrap=True)
    for kind, path in facts["files"].items():
        screen.print(Text(f"{kind:10} {path}"), soft_wrap=True)


def _short(picks: list[str]) -> str:
    """How many heads run which family, such as "7 sink-window, 2 full"."""
    families = [name.partition("(")[0] for name in picks]
    return ", ".join(f"{families.count(one)} {one}" for one in dict.fromkeys(families))
