"""The typer application: global options, the commands, and how errors are shown."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.text import Text

import foveate
from foveate.bench import command as bench
from foveate.cli import (
    circuits,
    claims,
    classify,
    compress,
    denoise,
    explain,
    fit,
    inspect,
    methods,
    recall,
    recommend,
    reproduce,
    retrieve,
    train,
)
from foveate.compare import command as compare
from foveate.cost import command as cost
from foveate.ops.errors import FoveateError


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"foveate {foveate.__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    """Which attention should I use, what does it gain me, and what does it cost?"""


def build() -> typer.Typer:
    """The application with all its commands."""
    app = typer.Typer(
        name="foveate",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    app.callback()(_root)
    compare.register(app)
    bench.register(app)
    cost.register(app)
    methods.register(app)
    explain.register(app)
    fit.register(app)
    inspect.register(app)
    compress.register(app)
    circuits.register(app)
    reproduce.register(app)
    claims.register(app)
    recall.register(app)
    train.register(app)
    classify.register(app)
    denoise.register(app)
    retrieve.register(app)
    recommend.register(app)
    return app


def run(args: list[str]) -> int:
    """Run one command; an error that foveate raised on purpose becomes one message and code 2."""
    try:
        result = build()(args=args, prog_name="foveate", standalone_mode=True)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except FoveateError as error:
        message = Text.assemble(("error: ", "bold red"), str(error))
        Console(stderr=True).print(message, soft_wrap=True, highlight=False)
        return 2
    return int(result or 0)
