"""`foveate reproduce`: run the miniatures of papers and say which claims hold."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveate import papers
from foveate.cli.progress import Screen, console
from foveate.ops.errors import FoveateError, InputError, MissingPackageError

if TYPE_CHECKING:
    from foveate.papers.harness.run import Result

OUT = "foveate-report/claims"
_STYLE = {"holds": "green", "refuted": "red", "inconclusive": "yellow"}


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("reproduce")(reproduce)


def reproduce(
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY ...]", help="Papers.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every paper that has a miniature.")] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="The same path in a minute; it is no verdict."),
    ] = False,
    out: Annotated[str, typer.Option(help="Folder for results, verdicts and figures.")] = OUT,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU.")] = None,
    workers: Annotated[
        int, typer.Option(help="Cells side by side; those that take times run alone.")
    ] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each verdict as one line of JSON.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Put earlier results aside and run anew.")
    ] = False,
) -> None:
    """Check what papers claim: a small experiment each, with its threshold stated before the run.

    Every arm is trained alike, with several seeds, and the verdict is "holds", "refuted" or
    "inconclusive". Finished seeds are kept in --out; stopped at any moment, a run goes on from
    there when it's started again.
    """
    wanted = _wanted(keys or [], every)
    from foveate.compare.options import parse_device
    from foveate.papers.harness.run import Run

    place = parse_device(device)
    failed = False
    with ExitStack() as stack:
        if threads is not None:
            stack.enter_context(Threads(threads))
        screen = stack.enter_context(Screen())
        chosen = [papers.load(key) for key in wanted]
        runs = [
            stack.enter_context(
                Run(paper, Path(out).expanduser(), quick=quick, fresh=fresh, device=place,
                    listener=screen, workers=workers)
            )
            for paper in chosen
        ]  # fmt: skip
        for run in runs:
            try:
                result = run()
            except FoveateError as error:
                if len(runs) == 1:
                    raise
                screen.end()
                screen.console.print(Text.assemble(("error: ", "bold red"), str(error)))
                failed = True
                continue
            draw_result(result, run.folder, screen)
            if as_json:
                sys.stdout.write(json.dumps(result.verdict, allow_nan=False) + "\n")
                sys.stdout.flush()
            else:
                show(result, console())
    if failed:
        raise typer.Exit(2)


def _wanted(keys: list[str], every: bool) -> list[str]:
    """The keys, checked.

    Raises:
        InputError: none is given, or together with --all.
        UnknownMethodError: one has no miniature.
    """
    known = papers.available()
    if every and keys:
        raise InputError(f"--all runs every paper; leave out {', '.join(keys)}, or --all.")
    if not every and not keys:
        raise InputError(f"Give the papers' keys, or --all; there are {', '.join(known)}.")
    for key in keys:
        papers.known(key)
    return list(known) if every else list(dict.fromkeys(keys))


class Threads:
    """Sets torch's threads, and puts them back."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise InputError(f"--threads {count}: expected 1 or more.")
        self.count = count

    def __enter__(self) -> None:
        import torch

        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *error: object) -> None:
        import torch

        torch.set_num_threads(self.before)


def draw_result(result: Result, folder: Path, screen: Screen) -> None:
    """Draw the figure beside the verdict, or say what it takes."""
    from foveate.papers.harness.figure import draw

    name = "figure.quick.png" if result.verdict["environment"]["quick"] else "figure.png"
    try:
        result.files["figure"] = draw(result, folder / name)
    except MissingPackageError as error:
        screen.say(str(error))


def show(result: Result, screen: Console) -> None:
    """A verdict for people: the arms, the checks with their intervals, and what was written."""
    verdict = result.verdict
    screen.print(Text.assemble((verdict["key"], "bold"), f"  {verdict['claim']}"), soft_wrap=True)
    screen.print(Text(f"{verdict['metric']}; seeds {_list(verdict['seeds'])}", style="dim"))
    for table in arms(verdict, screen.width):
        screen.print(table)
    checks = Table(box=None, pad_edge=False)
    for name in ("holds if", "mean", "90% interval", ""):
        checks.add_column(name, overflow="fold")
    for one in result.outcomes:
        interval = f"{one.found.low:.4g} to {one.found.high:.4g}"
        checks.add_row(
            Text(("needs " if one.need else "") + one.check.text),
            f"{one.found.mean:.4g}",
            "counted" if one.check.exact else interval if len(one.found.values) > 1 else "one seed",
            Text(one.verdict, style=_STYLE[one.verdict]),
        )
    screen.print(checks)
    word = verdict["verdict"]
    said = f"{verdict['key']}: {word}"
    if verdict["environment"]["quick"]:
        said += " (a quick run decides nothing but what is counted)"
    screen.print(Text(said, style=f"bold {_STYLE[word]}"))
    for kind, path in result.files.items():
        screen.print(Text(f"{kind:8} {path}", style="dim"), soft_wrap=True)
    screen.print()


def arms(verdict: dict[str, Any], width: int) -> Iterator[Table]:
    """The figures of all arms: a table for those with the same metrics, or several side by side.

    Args:
        verdict: as it is stored.
        width: of the screen; columns that don't fit come in a further table with the same arms.
    """
    from foveate.papers.harness.table import alike

    for group in alike(verdict):
        metrics = list(next(iter(group.values())))
        names = max(map(len, group))
        widths = [max(len(m), *(len(row[m]) for row in group.values())) for m in metrics]
        start = 0
        while start < len(metrics):
            stop, used = start + 1, names + 2 + widths[start]
            while stop < len(metrics) and used + 2 + widths[stop] <= width:
                used += 2 + widths[stop]
                stop += 1
            table = Table(box=None, pad_edge=False)
            table.add_column("")
            for metric in metrics[start:stop]:
                table.add_column(Text(metric), justify="right")
            for arm, row in group.items():
                table.add_row(Text(arm), *(row[m] for m in metrics[start:stop]))
            yield table
            start = stop


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values))
