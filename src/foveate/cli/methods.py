"""`foveate methods`: what there is, and everything about one of them."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveate import catalog


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("methods")(methods)


def methods(
    key: Annotated[str | None, typer.Argument(help="Show all about this one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods, or show one with its hyper-parameters, papers and capabilities."""
    if key is None:
        if as_json:
            typer.echo(json.dumps([row.as_dict() for row in catalog.rows()], indent=2))
        else:
            _print_all()
        return
    row = catalog.get(key)
    if as_json:
        fields = hyper_parameters(row.load())
        typer.echo(json.dumps(row.as_dict() | {"hyper_parameters": fields}, indent=2))
    else:
        _print_one(row)


def hyper_parameters(method: Any) -> dict[str, Any]:
    """The fields of a method's class with their defaults; None where one must be given."""
    found = {}
    for field in dataclasses.fields(method):
        if not field.init:
            continue
        if field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
        else:
            found[field.name] = None if field.default is dataclasses.MISSING else field.default
    return found


def _print_all() -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("key", "kind", "what it does", "paper"):
        table.add_column(name, no_wrap=name == "key", overflow="fold")
    for row in catalog.rows():
        papers = " ".join(paper.arxiv for paper in row.papers)
        table.add_row(f"[bold]{row.key}[/]", row.kind, row.summary, papers)
    console = Console()
    console.print(table)
    console.print("\nAll about one: foveate methods KEY", style="dim")


def _print_one(row: catalog.Row) -> None:
    fields = hyper_parameters(row.load())
    given = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    call = f"{row.key}({given})" if given else row.key
    facts = {"class": row.path, "hyper-parameters": given or "none"}
    if "use" in row.jobs:
        facts["adopt"] = f'foveate.use(model, "{call}")'
    facts["reached from"] = ", ".join(row.jobs)
    can = row.capabilities
    for field in dataclasses.fields(can):
        facts[field.name.replace("_", " ")] = str(getattr(can, field.name))
    for number, paper in enumerate(row.papers):
        facts["paper" + " " * number] = f"{paper.title}. {paper.authors}. {paper.url}"
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(name), Text(value))
    console = Console(highlight=False)
    console.print(Text.assemble((row.key, "bold"), f"  {row.title}, a {row.kind}\n{row.summary}\n"))
    console.print(table)
