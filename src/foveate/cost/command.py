"""`foveate cost`: its commands, and `foveate cost tiles`: options, table, figure."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveate.cost.afd_command import afd
from foveate.cost.context_command import context
from foveate.cost.decode_command import decode
from foveate.cost.figure import draw
from foveate.cost.memory_command import memory
from foveate.cost.presets import PRESETS
from foveate.cost.search import KERNELS, Pair, search
from foveate.cost.tiles import Tile, Visited, end_to_end, simulate
from foveate.cost.video_command import video
from foveate.ops import neighborhood
from foveate.ops.errors import InputError, nearest


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    cost = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
    cost.callback()(_group)
    cost.command("decode")(decode)
    cost.command("memory")(memory)
    cost.command("afd")(afd)
    cost.command("tiles")(tiles)
    cost.command("context")(context)
    cost.command("video")(video)
    app.add_typer(cost, name="cost", help="What attention will cost, before anyone runs it.")


def _group() -> None:
    """What attention will cost, before anyone runs it."""


def tiles(
    preset: Annotated[
        str | None, typer.Option(help="A model of the paper: cosmos, hunyuan, flux.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Of the grid, such as 30x48x80.")] = None,
    window: Annotated[str | None, typer.Option(help="Keys on each axis: 18x24x24.")] = None,
    stride: Annotated[
        str | None, typer.Option(help="Strides to compare: 1x1x1,16x8x8. Default: no stride.")
    ] = None,
    dilation: Annotated[str | None, typer.Option(help="Such as 1x2x2.")] = None,
    causal: Annotated[str | None, typer.Option(help="Axes, 1 where causal: 1x0x0.")] = None,
    q_tile: Annotated[str | None, typer.Option(help="Queries of a tile: 4x8x8.")] = None,
    kv_tile: Annotated[str | None, typer.Option(help="Keys of a tile: 2x8x8.")] = None,
    kernels: Annotated[
        str, typer.Option(help="Whose tiles to take where none are given: blackwell, hopper.")
    ] = "blackwell",
    find: Annotated[
        bool, typer.Option("--search", help="Look for strides and tiles that lose nothing.")
    ] = False,
    most: Annotated[int, typer.Option(help="Settings that a search shows.")] = 10,
    share: Annotated[
        float | None, typer.Option(help="Part of the model's time in attention, for end to end.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of a diffusion.")] = 1,
    dense_steps: Annotated[int, typer.Option(help="First ones of these that stay dense.")] = 0,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Key tiles begin where the first window does.")
    ] = False,
    backward: Annotated[
        bool, typer.Option("--backward", help="Count query tiles that key tiles visit.")
    ] = False,
    figure: Annotated[str | None, typer.Option(help="Write a figure here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tiles that neighborhood attention visits, and the speed that they allow.

    "parallel" is the bound where all query tiles run at once and the slowest sets the time (a GPU),
    "serial" where nobody waits (a CPU), "operations" what the window alone would allow.
    """
    if most < 1:
        raise InputError(f"--most {most}: expected at least 1.")
    if preset is not None:
        if shape or window or stride or q_tile or kv_tile or find or dilation or causal:
            raise InputError("--preset brings its own grid, windows, strides and tiles.")
        if share is not None or steps != 1 or dense_steps:
            raise InputError("--preset brings its own share of time, steps and dense steps.")
        rows = preset_rows(preset, dynamic=dynamic, backward=backward)
    else:
        if shape is None or window is None:
            raise InputError("Give --shape and --window, such as 30x48x80 and 18x24x24; or a "
                             "--preset: cosmos, hunyuan, flux.")  # fmt: skip
        grid = _sizes("--shape", shape)
        pairs = _pairs(q_tile, kv_tile, kernels, len(grid))
        keys = _sizes("--window", window)
        if share is None and (steps != 1 or dense_steps):
            raise InputError("--steps and --dense-steps are of a whole model: give --share, too.")
        amdahl = None if share is None else (share, steps, dense_steps)
        if find:
            if stride or dilation or causal or backward:
                raise InputError("--search goes through the strides of the forward by itself.")
            rows = [
                _row(grid, keys, one.stride, (one.q_tile, one.kv_tile), one.visited, amdahl)
                for one in search(grid, keys, pairs, dynamic=dynamic, most=most)
            ]
        else:
            more = _flags(dilation, causal, len(grid))
            strides = [_sizes("--stride", s) for s in (stride or "1").split(",")]
            masks = [neighborhood(grid, keys, s if len(s) > 1 else s[0], *more) for s in strides]
            rows = [
                _row(grid, keys, tuple(axis.stride for axis in mask.axes), pair,
                     simulate(mask, *pair, dynamic=dynamic, backward=backward), amdahl)
                for mask in masks for pair in pairs
            ]  # fmt: skip
    path = None if figure is None else draw(rows, Path(figure).expanduser())
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(_table(rows))
    if find and not all(row["optimal"] for row in rows):
        console.print("No setting makes all skipped work into time; these come closest.")
    if path is not None:
        console.print(Text(str(path), style="dim"), soft_wrap=True)


def preset_rows(
    name: str, *, dynamic: bool = False, backward: bool = False
) -> list[dict[str, Any]]:
    """The rows of a preset; "paper" is the paper's own figure for the whole model.

    Raises:
        InputError: an unknown name.
    """
    if name not in PRESETS:
        raise InputError(f"--preset {name} is not known; {nearest(name, PRESETS)}")
    preset = PRESETS[name]
    rows = []
    for case in preset.cases:
        for stride, paper in case.paper.items():
            mask = neighborhood(preset.shape, case.window, stride)
            pair = (case.q_tile, case.kv_tile)
            visited = simulate(mask, *pair, dynamic=dynamic, backward=backward)
            row = _row(preset.shape, case.window, stride, pair, visited, (preset.share, 1, 0))
            late = end_to_end(row["parallel"], preset.share, preset.steps, preset.dense_steps)
            rows.append(row | {"end_to_end_late": late, "paper": paper})
    return rows


def _row(
    shape: Tile,
    window: Tile,
    stride: Tile,
    pair: Pair,
    visited: Visited,
    amdahl: tuple[float, int, int] | None,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: "x".join(map(str, sizes))
        for name, sizes in (
            ("shape", shape), ("window", window), ("stride", stride),
            ("q_tile", pair[0]), ("kv_tile", pair[1]),
        )
    }  # fmt: skip
    found |= {
        "total": visited.total, "worst": visited.worst, "mean": visited.mean,
        "parallel": visited.parallel, "serial": visited.serial, "flops": visited.flops,
        "optimal": visited.optimal,
    }  # fmt: skip
    if amdahl is not None:
        found["end_to_end"] = end_to_end(visited.parallel, *amdahl)
        found["end_to_end_flops"] = end_to_end(visited.flops, *amdahl)
    return found


_COLUMNS = {
    "window": "window", "stride": "stride", "q_tile": "queries", "kv_tile": "keys",
    "total": "tiles", "worst": "most", "mean": "mean", "parallel": "parallel ×",
    "serial": "serial ×", "flops": "operations ×", "end_to_end": "model ×",
    "end_to_end_flops": "by operations", "end_to_end_late": "dense first", "paper": "paper",
}  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> Table:
    shown = [name for name in _COLUMNS if any(name in row for row in rows)]
    table = Table(box=None, pad_edge=False)
    for name in shown:
        text = name in ("window", "stride", "q_tile", "kv_tile")
        table.add_column(_COLUMNS[name], justify="left" if text else "right", no_wrap=True)
    for row in rows:
        values = (row.get(name) for name in shown)
        cells = [
            f"{x:.2f}" if isinstance(x, float) else "" if x is None else str(x) for x in values
        ]
        table.add_row(*cells, style="bold" if row["optimal"] else None)
    return table


def _sizes(option: str, text: str) -> Tile:
    parts = text.lower().split("x")
    if not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"{option} {text!r}: expected numbers such as 30x48x80.")
    return tuple(map(int, parts))


def _flags(dilation: str | None, causal: str | None, rank: int) -> tuple[Tile, tuple[bool, ...]]:
    spread = _sizes("--dilation", dilation) if dilation else (1,) * rank
    flags = _sizes("--causal", causal) if causal else (0,) * rank
    if any(flag not in (0, 1) for flag in flags):
        raise InputError(f"--causal {causal!r}: expected 1 for causal axes and 0 for others.")
    return spread, tuple(map(bool, flags))


def _pairs(q_tile: str | None, kv_tile: str | None, kernels: str, rank: int) -> tuple[Pair, ...]:
    if (q_tile is None) != (kv_tile is None):
        raise InputError("Give both --q-tile and --kv-tile, or neither.")
    if q_tile is not None and kv_tile is not None:
        return ((_sizes("--q-tile", q_tile), _sizes("--kv-tile", kv_tile)),)
    if kernels not in KERNELS:
        raise InputError(f"--kernels {kernels} is not known; {nearest(kernels, KERNELS)}")
    if rank not in KERNELS[kernels]:
        raise InputError(f"--shape: expected 1 to 3 axes, got {rank}.")
    return KERNELS[kernels][rank]
