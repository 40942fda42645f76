"""`foveate denoise`: a small video diffusion transformer with any attention, on generated clips."""

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
    app.command("denoise")(denoise)


def denoise(
    attention: Annotated[
        str,
        typer.Option(
            help='Such as full, "vmoba(frames=1, tile=(4, 4), box=(2, 4, 4))" or '
            '"rectified-spaattn(block=64)"; blocks are counted in tokens.'
        ),
    ] = "full",
    size: Annotated[str, typer.Option(help="Frames x height x width of a clip.")] = "6x16x16",
    patch: Annotated[str, typer.Option(help="Frames x height x width of a token.")] = "1x2x2",
    steps: Annotated[int, typer.Option(help="Of the optimizer.")] = 1000,
    batch: Annotated[int, typer.Option(help="Clips in each step.")] = 8,
    layers: Annotated[int, typer.Option(help="Blocks.")] = 6,
    dim: Annotated[int, typer.Option(help="Width.")] = 64,
    heads: Annotated[int, typer.Option(help="Heads.")] = 4,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-3,
    every: Annotated[int, typer.Option(help="Steps between evaluations and checkpoints.")] = 100,
    sampling: Annotated[int, typer.Option(help="Steps of a sample.")] = 20,
    seed: Annotated[int, typer.Option(help="Of weights, data and samples.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    out: Annotated[str, typer.Option(help="Folder for the model, checkpoints and pictures.")] = (
        "foveate-video"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the training in --out, bit by bit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Train a small video diffusion transformer on generated clips, and draw samples.

    The model is asked for the clean clip, given a noised one; two soft balls fly about in each.
    samples.png holds clips that were drawn from noise, denoised.png held-out clips, noised and as
    predicted. Stopped at any moment, the same command with --resume goes on.
    """
    from foveate.compare.options import parse_device
    from foveate.papers.training import video as job
    from foveate.papers.training.regime import Regime

    made = job.Job(
        attention=attention,
        sizes=_three("--size", size),
        patch=_three("--patch", patch),
        dim=dim,
        depth=layers,
        heads=heads,
        regime=Regime(
            steps=steps, batch=batch, lr=lr, warmup=min(1.0, 50 / max(1, steps)), every=every,
            weight_decay=0.01, seed=seed,
        ),
        sampling=sampling,
        out=Path(out).expanduser(),
        device=parse_device(device),
        resume=resume,
    )  # fmt: skip
    with Screen() as screen:
        tell = screen.steps(f"denoising with {attention}", steps)
        try:
            facts = job.run(made, tell, screen.say)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "safetensors":
                raise
            raise MissingPackageError(
                "foveate denoise needs safetensors: pip install 'foveate[hf]'"
            ) from error
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    else:
        show(facts, console())


def _three(name: str, text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"{name} {text!r}: expected three numbers, such as 6x16x16.")
    frames, height, width = (int(part) for part in parts)
    return frames, height, width


def show(facts: dict[str, Any], screen: Console) -> None:
    """The figures for people, and where the pictures are."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    share = facts["error"] / facts["error of the mean"]
    for name, value in (
        ("model", f"{facts['attention']}, {facts['parameters']:,} weights, "
                  f"{facts['tokens']} tokens"),
        ("data", facts["data"]),
        ("error", f"{facts['error']:.4f} squared, {share:.1%} of predicting the mean clip"),
        ("pictures", ", ".join(facts["pictures"]) or "none"),
    ):  # fmt: skip
        table.add_row(name, Text(value))
    screen.print(table)
