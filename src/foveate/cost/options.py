"""Options that the cost commands share: models, chips, contexts, and how they are printed."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveate.cost.config import matrices_of_class, read
from foveate.cost.layer import Model
from foveate.cost.released import RELEASED, kernel_values, released
from foveate.ops.errors import InputError

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Folder of a transformers model; its config.json is read."),
]
PresetOption = Annotated[
    str | None,
    typer.Option("--preset", help=f"Models of Step-3's tables, or all: {', '.join(RELEASED)}."),
]
HardwareOption = Annotated[
    str | None,
    typer.Option("--hardware", help="TOML file with more chips; data/hardware.toml is an example."),
]
KvBitsOption = Annotated[
    float | None,
    typer.Option("--kv-bits", help="Of every cached number; default 8, or as a preset says."),
]
Bf16Option = Annotated[
    bool, typer.Option("--bf16", help="Multiply in BF16 on chips that have FP8, too.")
]
MlaOption = Annotated[
    str,
    typer.Option(
        "--mla-values",
        help="What MLA's value product counts: the whole entry, as Step-3's tables do, or the "
        "latent, as kernels do.",
    ),
]
FigureOption = Annotated[str | None, typer.Option("--figure", help="Write a figure here.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_UNITS = {"": 1, "k": 2**10, "m": 2**20}


def models(model: str | None, preset: str | None, mla_values: str = "entry") -> list[Model]:
    """The models that are asked for.

    Raises:
        InputError: neither or both of --model and --preset, or what they name can't be read.
    """
    if (model is None) == (preset is None):
        raise InputError(
            "Give either --model FOLDER, or --preset with one of "
            f"{', '.join(RELEASED)} (several with commas), or all."
        )
    if mla_values not in ("entry", "latent"):
        raise InputError(f"--mla-values {mla_values}: expected entry or latent.")
    found = released(preset) if preset is not None else [read(model or "")]
    return [kernel_values(one) for one in found] if mla_values == "latent" else found


def warning(model: str | None, found: Sequence[Model]) -> str | None:
    """What to say if transformers' own class of a folder's model has other weights than we count.

    Or if there is none to compare with.

    Args:
        model: the folder, None for a preset.
        found: what was read from it.
    """
    if model is None:
        return None
    theirs, ours = matrices_of_class(model), found[0].parameters
    if theirs is None:
        return (
            f"{found[0].name}: not compared with a class of transformers, which doesn't know this "
            "model type or can't build it; the counts follow the config's fields alone."
        )
    if abs(theirs - ours) <= 0.01 * theirs:
        return None
    return (
        f"{found[0].name}: transformers' own class has {theirs:,} numbers in its matrices, this "
        f"count {ours:,}; parts of its blocks are not read right, so take its figures with care."
    )


def contexts(text: str, option: str = "--contexts") -> list[int]:
    """Numbers of tokens: "8K,32K" (8K is 8192), or "1K..128K" for every doubling between.

    Raises:
        InputError: the text is something else.
    """
    found: list[int] = []
    for part in text.split(","):
        ends = [_tokens(option, text, end) for end in part.split("..")]
        if len(ends) == 1:
            found.append(ends[0])
        elif len(ends) == 2 and ends[0] <= ends[1]:
            steps = int(math.log2(ends[1] / ends[0]) + 1e-9)
            found += [ends[0] * 2**i for i in range(steps + 1)]
        else:
            raise InputError(f"{option} {text!r}: expected such as 8K,32K or 1K..128K.")
    return list(dict.fromkeys(found))


def _tokens(option: str, text: str, part: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([kKmM]?)\s*", part)
    if match is None or int(match[1]) < 1:
        raise InputError(f"{option} {text!r}: expected such as 8K,32K or 1K..128K.")
    return int(match[1]) * _UNITS[match[2].lower()]


def short(tokens: int) -> str:
    """8192 as 8K."""
    for power, unit in ((2**20, "M"), (2**10, "K")):
        if tokens >= power and tokens % power == 0:
            return f"{tokens // power}{unit}"
    return str(tokens)


def bytes_text(count: float) -> str:
    """For people: three digits and a decimal unit."""
    for power, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= power:
            return f"{count / power:.3g} {unit}"
    return f"{count:.0f} B"


def say(
    found: dict[str, Any],
    tables: Sequence[Table],
    notes: Sequence[str | None],
    *,
    as_json: bool,
    figure: Path | None,
) -> None:
    """Print JSON, or tables, notes and where the figure is."""
    said = [note for note in notes if note]
    if as_json:
        sys.stdout.write(json.dumps(found | {"notes": said}, indent=2, allow_nan=False) + "\n")
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for number, table in enumerate(tables):
        if number:
            console.print()
        console.print(table)
    for note in said:
        console.print(Text(note), soft_wrap=True)
    if figure is not None:
        console.print(Text(str(figure), style="dim"), soft_wrap=True)


def table(title: str, *columns: str, left: int = 1) -> Table:
    """An empty table; the first `left` columns hold text."""
    made = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        made.add_column(name, justify="left" if number < left else "right", no_wrap=True)
    return made
