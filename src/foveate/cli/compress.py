"""`foveate compress`: layers of a trained model share attention maps, repaired by distillation."""

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
from foveate.ops.errors import InputError, MissingPackageError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compress")(compress)


def compress(
    model: Annotated[
        str | None, typer.Argument(help="A folder, hub id or demo model. Default: smollm2.")
    ] = None,
    share: Annotated[float, typer.Option(help="Share of the layers that copy.")] = 0.33,
    followers: Annotated[
        str | None, typer.Option(help="Layers that copy, such as 4,6,8; default: chosen.")
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="Cut the inner layers into blocks of so many instead.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="How maps are handed on: auto, store, recompute or stats.")
    ] = "auto",
    text: Annotated[
        str | None, typer.Option(help="A text file. Default: WikiText-2's test split, shipped.")
    ] = None,
    first: Annotated[int, typer.Option(help="Steps of distillation.")] = 80,
    second: Annotated[int, typer.Option(help="Steps on the true next tokens.")] = 20,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-4,
    length: Annotated[int, typer.Option(help="Tokens of a training sequence.")] = 256,
    batch: Annotated[int, typer.Option(help="Sequences in each step.")] = 4,
    judged: Annotated[int, typer.Option(help="Held-out sequences that judge.")] = 48,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt whose speed counts.")] = 1024,
    decode: Annotated[int, typer.Option(help="Tokens decoded behind it.")] = 32,
    rounds: Annotated[int, typer.Option(help="Of the speed measurement.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    out: Annotated[str, typer.Option(help="Folder for the student.")] = "foveate-compressed",
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Let layers with nearly the same attention map share one (EchoAtt), and repair the model.

    The similarity of the layers is measured on real text, the most alike copy their neighbour's map
    and lose their queries and keys, and the smaller model learns from the original. Parameters,
    speed and perplexity before and after are measured in the same run. Stopped at any moment, the
    same command goes on. The folder's model loads with AutoModelForCausalLM after import foveate.
    """
    from foveate.compare.options import parse_device
    from foveate.runs.text import load_text

    try:
        from foveate.compress import job
        from foveate.models.echo import Stages
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in {"transformers", "safetensors"}:
            raise
        raise MissingPackageError(
            f"foveate compress needs {name}: pip install 'foveate[hf]'"
        ) from error
    for name, value in (("first", first), ("second", second)):
        if value < 0:
            raise InputError(f"--{name} {value}: expected 0 or more steps.")
    for name, value in (
        ("length", length), ("batch", batch), ("judged", judged), ("prompt", prompt),
        ("decode", decode), ("rounds", rounds),
    ):  # fmt: skip
        if value < 1:
            raise InputError(f"--{name} {value}: expected 1 or more.")
    if not 0 < lr < float("inf"):
        raise InputError(f"--lr {lr}: expected a number above 0.")
    made = job.Job(
        model, load_text(text), Path(out).expanduser(), _numbers(followers), share, block, mode,
        Stages(first, second, lr), length, batch, judged, prompt, decode, rounds,
        parse_device(device), fresh,
    )  # fmt: skip
    with Screen() as screen:
        screen.begin("compressing", 100)
        facts = job.run(made, lambda done, doing: screen.advance(100 * done, doing), screen.say)
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    else:
        show(facts, console())


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise InputError(f"--followers {text}: expected indices of layers, such as 4,6,8.")
    return tuple(int(word) for word in words)


def show(facts: dict[str, Any], screen: Console) -> None:
    """The figures for people, and the Python that loads the student."""
    weights, cache, speed = facts["parameters"], facts["cache_numbers_per_token"], facts["speed"]
    table = Table(box=None, pad_edge=False)
    for name in ("", "weights", "cache a token", "prefill", "decode", "perplexity"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    ppl = facts["perplexity"]

    def row(title: str, which: str, quality: str, timed: bool = True) -> None:
        at = speed[which] if timed else None
        table.add_row(
            title,
            f"{weights['student' if which == 'student' else 'original']:,}",
            f"{cache['student' if which == 'student' else 'original']:,}",
            f"{at['prefill_tokens_per_second']:.0f} tok/s" if at else "",
            f"{at['decode_tokens_per_second']:.1f} tok/s" if at else "",
            f"{ppl[quality]['perplexity']:.2f}",
        )

    row("transformers", "transformers", "original")
    row("original", "original", "original")
    row("original, second stage alone", "original", "original, second stage", timed=False)
    row("shared, untrained", "student", "before distillation", timed=False)
    row("shared, distilled", "student", "after distillation")
    screen.print(Text(f"{facts['model']}: {len(facts['followers'])} of {facts['layers']} layers"
                      f" copy, {facts['followers']}"), soft_wrap=True)  # fmt: skip
    screen.print(table)
    steps = facts["training"]
    fill, step = (speed["student"][f"{n}_times_faster"]["median"] for n in ("prefill", "decode"))
    screen.print(
        Text(
            f"The student has {weights['student'] / weights['original']:.1%} of the weights and "
            f"{cache['student'] / cache['original']:.1%} of the cache; prefill {fill:.2f}x, decode "
            f"{step:.2f}x the original's speed in the same layers. Any model gets better at a text "
            f"that it is trained on: the student had {steps['first'] + steps['second']} steps, the "
            f"original, second stage alone, the last {steps['second']} of them.\n\n"
            "import foveate\nfrom transformers import AutoModelForCausalLM\n"
            f"model = AutoModelForCausalLM.from_pretrained({facts['folder']!r})"
        ),
        soft_wrap=True,
    )
