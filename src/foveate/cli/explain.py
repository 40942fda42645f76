"""`foveate explain`: which backend would run an attention here, and why not the others."""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveate.compare import options
from foveate.compare.environment import environment
from foveate.ops import Mask, explain, parse_mask
from foveate.ops.errors import InputError, nearest

DTYPES = options.DTYPES | {"float64": torch.float64}


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("explain")(command)


def command(
    mask: Annotated[
        str, typer.Option(help='Who may attend to whom, such as "causal() & window(1023, 0)".')
    ] = "causal()",
    q_len: Annotated[int | None, typer.Option(help="Queries; default as many as keys.")] = None,
    kv_len: Annotated[int, typer.Option(help="Keys.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int | None, typer.Option(help="Key heads; default as many.")] = None,
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    grad: Annotated[bool, typer.Option("--grad", help="With a backward pass.")] = False,
    backend: Annotated[str, typer.Option(help="Ask for one backend instead of the best.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what would run here and why: backend, the others' reasons, work to be done."""
    q_len = kv_len if q_len is None else q_len
    kv_heads = heads if kv_heads is None else kv_heads
    for name, size in (
        ("--kv-len", kv_len), ("--q-len", q_len), ("--batch", batch), ("--heads", heads),
        ("--kv-heads", kv_heads), ("--head-dim", head_dim),
    ):  # fmt: skip
        if size < 1:
            raise InputError(f"{name} must be at least 1, got {size}.")
    parsed = parse_mask(mask)
    kind, place = _dtype(dtype), options.parse_device(device)
    query = torch.empty(batch, heads, q_len, head_dim, dtype=kind, device=place, requires_grad=grad)
    key = torch.empty(batch, kv_heads, kv_len, head_dim, dtype=kind, device=place)
    chosen = explain(query, key, key, parsed, backend=backend)
    facts = {
        "backend": chosen.backend,
        "reasons": chosen.reasons,
        "mask": repr(parsed),
        "layout": _layout(parsed, q_len, kv_len, batch, heads, head_dim),
        "environment": environment(place)
        | {
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)


def _dtype(name: str) -> torch.dtype:
    full = options.SHORT.get(name, name)
    if full not in DTYPES:
        raise InputError(f"--dtype {name} is not known; {nearest(name, [*DTYPES, *options.SHORT])}")
    return DTYPES[full]


def _layout(
    mask: Mask, q_len: int, kv_len: int, batch: int, heads: int, head_dim: int
) -> dict[str, float]:
    layout = mask.layout(q_len, kv_len)
    return {
        "pairs": layout.pairs,
        "density": layout.density,
        "tile_area": layout.tile_area,
        "tile_density": layout.tile_density,
        "flops": layout.flops(batch, heads, head_dim, head_dim),
    }


def _print(facts: dict[str, Any]) -> None:
    layout = facts["layout"]
    work = {
        "pairs": f"{layout['pairs']:,.0f} per sequence and head, {layout['density']:.2%} of all",
        "visited": f"{layout['tile_area']:,.0f} in tiles, {layout['tile_density']:.2%} of all",
        "work": f"{layout['flops'] / 1e9:,.3f} GFLOP forward, for all sequences and heads",
    }
    others = {
        name: "; ".join(reasons)
        for name, reasons in facts["reasons"].items()
        if name != facts["backend"]
    }
    here = {name: str(value) for name, value in facts["environment"].items() if value is not None}
    console = Console(highlight=False)
    for title, rows in (
        ("", {"backend": facts["backend"], "mask": facts["mask"]} | work),
        ("not the others", others),
        ("here", here),
    ):
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="bold", no_wrap=True, min_width=10)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(Text(name), Text(value))
        if title:
            console.print(Text(f"\n{title}", style="dim"))
        console.print(table)
