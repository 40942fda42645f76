"""`foveate cost video`: operations of a video diffusion transformer, dense and with blocks."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from foveate.cost.video import MODELS, VideoModel
from foveate.ops.errors import InputError, nearest


def video(
    tokens: Annotated[
        str, typer.Option(help="Of a video, such as 55296, or of its latent grid, 24x36x64.")
    ] = "24x36x64",
    density: Annotated[
        str, typer.Option(help="Shares of all pairs that self attention computes: 0.13,0.19.")
    ] = "0.19",
    blocks: Annotated[
        str, typer.Option(help="Blocks that are scored, in layers 0, 1, 2, ... over and over.")
    ] = "8,48,72",
    model: Annotated[str, typer.Option(help="wan-1.3b; the next three change it.")] = "wan-1.3b",
    layers: Annotated[int | None, typer.Option(help="Blocks of the model.")] = None,
    width: Annotated[int | None, typer.Option(help="Of a token.")] = None,
    feedforward: Annotated[int | None, typer.Option(help="Inner width.")] = None,
    text: Annotated[int | None, typer.Option(help="Tokens of text, in cross attention.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Operations of one forward of a video diffusion transformer, in units of 10^12.

    Dense, and with self attention to chosen blocks (foveate methods vmoba) at each density.
    """
    if model not in MODELS:
        raise InputError(f"--model {model!r} is not known; {nearest(model, MODELS)}")
    base = MODELS[model]
    made = VideoModel(
        layers=base.layers if layers is None else layers,
        width=base.width if width is None else width,
        feedforward=base.feedforward if feedforward is None else feedforward,
        text=base.text if text is None else text,
    )
    count = 1
    for side in _numbers("--tokens", tokens, "x"):
        count *= side
    each = _numbers("--blocks", blocks, ",")
    full = made.flops(count)
    rows = [{"density": 1.0, "tera": full / 1e12, "times fewer": 1.0}]
    for share in _shares(density):
        ours = made.flops(count, share, each)
        rows.append({"density": share, "tera": ours / 1e12, "times fewer": full / ours})
    if as_json:
        sys.stdout.write(json.dumps({"tokens": count, "rows": rows}, indent=2) + "\n")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("density", "10^12 operations", "times fewer"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(f"{row['density']:g}", f"{row['tera']:.2f}", f"{row['times fewer']:.2f}")
    Console(highlight=False).print(f"{count:,} tokens", table)


def _numbers(name: str, given: str, between: str) -> tuple[int, ...]:
    parts = [part.strip() for part in given.split(between)]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"{name} {given!r}: expected whole numbers above 0.")
    return tuple(int(part) for part in parts)


def _shares(given: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in given.split(","))
    except ValueError as error:
        raise InputError(f"--density {given!r}: expected numbers, such as 0.13,0.19.") from error
    if not all(0 <= share <= 1 for share in found):
        raise InputError(f"--density {given!r}: expected shares from 0 to 1.")
    return found
