"""`foveate recall`: attentions trained alike on recall and needle, with windows of equal cost."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.progress import Screen, console
from foveate.cli.reproduce import Threads, draw_result, show
from foveate.methods import split
from foveate.ops.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("recall")(recall)


def recall(
    methods: Annotated[
        str | None,
        typer.Option(
            help="Attentions by key, or with hyper-parameters, in which {n}, {root} and {rest} "
            "stand for the length, about its square root, and their ratio. Default: the sparse "
            "ones that are trained."
        ),
    ] = None,
    tasks: Annotated[str, typer.Option(help="recall, needle.")] = "recall,needle",
    steps: Annotated[int, typer.Option(help="Of each training, up to 2500.")] = 2000,
    rates: Annotated[
        str,
        typer.Option(
            help="Learning rates; of several, each arm's best is taken, at a training each."
        ),
    ] = "0.001,0.003",
    seeds: Annotated[int, typer.Option(help="How many.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="The same path in a minute; it decides nothing.")
    ] = False,
    out: Annotated[str, typer.Option(help="Folder for results and the figure.")] = (
        "foveate-report"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU.")] = None,
    workers: Annotated[int, typer.Option(help="Trainings side by side.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Put earlier results aside and run anew.")
    ] = False,
) -> None:
    """Which attention recalls far tokens, on an equal training budget?

    Small models that differ in their attention alone: dense, a small window, each method, and for
    each a window with as many operations. Finished cells are kept in --out; stopped at any moment,
    a run goes on from there when it's started again.
    """
    from foveate import catalog
    from foveate.compare.options import parse_device
    from foveate.papers.contest.job import Contest, paper_of
    from foveate.papers.harness.run import Run
    from foveate.runs.growth import TRAINED

    if seeds < 1:
        raise InputError(f"--seeds {seeds}: expected 1 or more.")
    keys = catalog.keys()
    there = tuple(key for key in TRAINED if key in keys)
    contest = Contest(
        methods=tuple(split(methods)) if methods else there,
        tasks=tuple(word.strip() for word in tasks.split(",") if word.strip()),
        steps=steps,
        rates=_rates(rates),
        seeds=tuple(range(seeds)),
    )
    place = parse_device(device)
    with ExitStack() as stack:
        if threads is not None:
            stack.enter_context(Threads(threads))
        screen = stack.enter_context(Screen())
        run = stack.enter_context(
            Run(
                paper_of(contest), Path(out).expanduser(), quick=quick, fresh=fresh, device=place,
                listener=screen, workers=workers,
            )
        )  # fmt: skip
        result = run()
        draw_result(result, run.folder, screen)
        if as_json:
            sys.stdout.write(json.dumps(result.verdict, allow_nan=False) + "\n")
        else:
            show(result, console())


def _rates(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(word) for word in text.split(",") if word.strip())
    except ValueError as error:
        raise InputError(f"--rates {text!r}: expected numbers, such as 0.001,0.003.") from error
    if not all(rate > 0 for rate in found):
        raise InputError(f"--rates {text!r}: expected numbers above 0.")
    return found
