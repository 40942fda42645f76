"""`foveate circuits`: which heads of a model talk to which, and what they say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import foveate
from foveate.cli.progress import Screen, console
from foveate.ops.errors import InputError, MissingPackageError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("circuits")(circuits)


def circuits(
    model: Annotated[
        str | None, typer.Argument(help="A folder, hub id or demo model. Default: smollm2.")
    ] = None,
    kinds: Annotated[
        str, typer.Option(help="What of later heads is fed: letters out of q, k and v.")
    ] = "qkv",
    into: Annotated[
        str | None, typer.Option(help="Later heads, such as 9.6,9.9; default: all.")
    ] = None,
    top: Annotated[int, typer.Option(help="Channels to tell of each kind.")] = 10,
    offset: Annotated[
        int | None,
        typer.Option(help="How far keys stand behind queries (RoPE); default: not turned."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Leave the norms' gain out of the maps that read.")
    ] = False,
    task: Annotated[
        str, typer.Option(help="Test channels on prompts: ioi or laundry; or none.")
    ] = "none",
    items: Annotated[int, typer.Option(help="Longest list of the laundry task.")] = 8,
    prompts: Annotated[int, typer.Option(help="Of the task.")] = 32,
    movers: Annotated[int, typer.Option(help="Heads whose channels are tested.")] = 2,
    tried: Annotated[int, typer.Option(help="Components taken away, of each of them.")] = 4,
    seed: Annotated[int, typer.Option(help="Of prompts and controls.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    out: Annotated[
        str | None,
        typer.Option(help="Folder for circuits.json, figures, and what was measured so far."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Find the channels through which heads talk, from weights, and test them on a task.

    What each head writes is cut into singular components, and each is scored against what every
    later head reads (query, key, value). Whole heads hide such channels in their sum. With a task
    the strongest components into the heads that find the answer are taken away one by one, for that
    head alone and for all, beside random ones as a control; laundry also rescales them. With --out
    a run that was stopped goes on.
    """
    from foveate.compare.options import parse_device

    try:
        from foveate.hf.load import load_tokenizer, load_weights, locate
        from foveate.lens.circuits_job import Circuits
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in {"transformers", "safetensors"}:
            raise
        raise MissingPackageError(
            f"foveate circuits needs {name}: pip install 'foveate[hf]'"
        ) from error
    wanted = None if into is None else tuple(word.strip() for word in into.split(","))
    job = Circuits(not raw, offset, kinds, top, wanted, task, items, prompts, movers, tried, seed)
    place = parse_device(device)
    folder = None if out is None else Path(out).expanduser()
    with Screen() as screen:
        info = locate(model, progress=screen.say)
        if info.kind != "causal-lm":
            raise InputError(f"{info.name} is no causal language model; circuits reads decoders.")
        tokenizer = None if task == "none" else load_tokenizer(info)
        screen.say(f"Loading {info.name}")
        loaded = load_weights(info, device=place)
        screen.begin("circuits", 100)
        facts = _run(job, info, loaded, tokenizer, folder, fresh, screen)
    facts = {"model": info.name, "fingerprint": info.fingerprint} | facts
    if folder is not None:
        from foveate.lens.circuits_figure import draw

        files = draw(facts, folder)
        told = folder / "circuits.json"
        told.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        facts["files"] = [str(file) for file in (told, *files)]
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    else:
        show(facts, console())


def _run(
    job: Any,
    info: Any,
    model: Any,
    tokenizer: Any,
    folder: Path | None,
    fresh: bool,
    screen: Screen,
) -> dict[str, Any]:
    """The look itself; figures of the task are kept in the folder as they come."""
    from foveate.runs.records import Records, digest

    def tell(share: float, doing: str) -> None:
        screen.advance(100 * share, doing)

    screen.begin("circuits", 100)
    if folder is None:
        found: dict[str, Any] = job(model, tokenizer, tell)
        return found
    setting = {"model": info.fingerprint, "version": foveate.__version__} | asdict(job)
    with Records(folder, fresh=fresh) as records:
        for note in records.notes:
            screen.say(note)

        def keep(what: dict[str, Any], how: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            key = digest({"setting": setting, "cell": what})
            values = records.get(key)
            if values is None:
                values = how()
                records.add(key, what, values)
            return values

        kept: dict[str, Any] = job(model, tokenizer, tell, keep)
        return kept


def show(facts: dict[str, Any], screen: Console) -> None:
    """The figures for people."""
    folded = "with" if facts["folded"] else "without"
    turned = ""
    if facts["rotary"]:
        at = facts["offset"]
        turned = ", rotary positions left out" if at is None else f", keys {at} tokens behind"
    screen.print(
        Text(
            f"{facts['model']}: {facts['heads']} heads of {facts['components']} components in "
            f"{facts['layers']} layers, {folded} the norms' gain{turned}. A random direction "
            f"scores {facts['chance']:.3f}."
        ),
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for name in ("channel", "score", "z", "without norm", "s", "s x score", "whole", "rank"):
        table.add_column(name, justify="left" if name == "channel" else "right", no_wrap=True)
    for found in facts["channels"].values():
        for one in found:
            table.add_row(*_row(one))
    screen.print(table)
    if "task" in facts:
        _show_task(facts["task"], screen)
    for file in facts.get("files", ()):
        screen.print(Text(file, style="dim"), soft_wrap=True)


def _row(one: dict[str, Any]) -> list[str]:
    return [
        one["channel"], f"{one['score']:.3f}", f"{one['z']:.1f}", f"{one['unfolded']:.3f}",
        f"{one['singular']:.2f}", f"{one['effect']:.2f}", f"{one['whole']:.3f}",
        str(one["whole_rank"]),
    ]  # fmt: skip


def _show_task(task: dict[str, Any], screen: Console) -> None:
    screen.print(
        Text(
            f"\n{task['name']}: {task['accuracy']:.0%} of {task['prompts']} prompts right, the "
            f"answer {task['margin']:.2f} above the others"
        ),
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for name in ("head, without", "inhibition", "lost", "accuracy", "margin"):
        table.add_column(name, justify="left" if "head" in name else "right", no_wrap=True)
    for mover in task["movers"]:
        table.add_row(mover["head"], f"{mover['inhibition']:.3f}", "", f"{task['accuracy']:.0%}",
                      f"{task['margin']:.2f}")  # fmt: skip
        rows = [("  " + one["channel"].partition(" ->")[0], one) for one in mover["components"]]
        for name, one in (*rows, ("  all of these", mover["all"]), ("  random", mover["control"])):
            table.add_row(
                name, f"{one['inhibition_without']:.3f}", f"{one['inhibition_lost']:.0%}",
                f"{one['accuracy_without']:.0%}", f"{one['margin_without']:.2f}",
            )  # fmt: skip
    screen.print(table)
    if "by_items" in task:
        told = ", ".join(f"{n}: {value:.0%}" for n, value in task["by_items"].items())
        one = task["rescaled"]
        screen.print(
            Text(
                f"Right by objects listed: {told}. {', '.join(one['components'])} times "
                f"{one['factor']:g} (chosen on other prompts: {one['train_before']:.0%} to "
                f"{one['train']:.0%}): {one['test_before']:.0%} to {one['test']:.0%}."
            ),
            soft_wrap=True,
        )
