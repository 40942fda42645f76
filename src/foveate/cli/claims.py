"""`foveate claims`: all papers in one table, from verdicts that are kept; nothing is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from foveate import catalog, papers
from foveate.cli.progress import console
from foveate.ops.errors import InputError
from foveate.papers.harness import overview
from foveate.papers.harness.table import kept_verdicts

KEPT = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "claims"
_STYLE = {"holds": "green", "refuted": "red", "inconclusive": "yellow"}


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("claims")(claims)


def claims(
    results: Annotated[
        str | None,
        typer.Option(
            help="Folder of verdicts, KEY.json each; default benchmarks/results/claims of the "
            "checkout that foveate runs from."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Every paper with its claim, what was measured, the verdict, and what it took.

    Kept figures are judged again by today's thresholds. `foveate reproduce KEY` runs one anew.
    """
    found = overview.rows(papers_of_the_list(), papers.available(), papers.load, _kept(results))
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2, allow_nan=False) + "\n")
    else:
        _print(found)


def papers_of_the_list() -> tuple[str, ...]:
    """Keys of the papers that the catalog's rows come from; with or without a miniature."""
    return tuple(dict.fromkeys(row.miniature for row in catalog.rows() if row.miniature))


def _kept(results: str | None) -> dict[str, dict[str, Any]]:
    if results is not None:
        folder = Path(results).expanduser()
        if not folder.is_dir():
            raise InputError(f"--results {results}: expected a folder of verdicts, KEY.json each.")
        return kept_verdicts(folder)
    if not KEPT.is_dir():
        raise InputError(
            "This foveate doesn't run from a checkout, so it has no verdicts at hand: name a "
            "folder of them by --results, each a verdict.json of foveate reproduce, as KEY.json."
        )
    return kept_verdicts(KEPT)


def _print(found: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("paper", "verdict", "conditions", "ours", "took", "claim"):
        table.add_column(name, overflow="fold", no_wrap=name == "paper")
    for row in found:
        word = row["verdict"]
        table.add_row(
            Text(row["key"], style="bold"),
            Text(word, style=_STYLE.get(word, "dim")),
            overview.met(row),
            Text(row["ours"] or ""),
            overview.took(row),
            Text(row["claim"] or ""),
        )
    screen = console()
    screen.print(table)
    screen.print(f"\n{overview.summary(found)}")
    screen.print(Text("Run one again: foveate reproduce KEY", style="dim"))
