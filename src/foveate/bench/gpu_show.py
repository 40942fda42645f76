"""Results of a GPU on the screen."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from foveate.bench.show import _remark, _share, _times

Found = dict[str, Any]
_SPARSE = 0.05  # of the tiles visited, from which lists have work to speak of


def kernel_table(found: list[Found]) -> Table:
    """One row for each contestant of each cell."""
    table = Table(box=None, pad_edge=False)
    for name in ("mask", "tokens", "D", "dtype", "pass", "by"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "TFLOP/s", "of peak", "of ideal", "× flex", "× flash", "× cuDNN", "tiles"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for one in found:
        cell, values = one["cell"], one["values"]
        for result in values["results"]:
            table.add_row(
                cell["mask"], f"{cell['batch']} x {cell['length']}", str(cell["head_dim"]),
                cell["dtype"], cell["direction"], result["backend"], *_speed(result),
                f"{values['tile_density']:.1%}",
                Text(_remark(result), style="red" if "failed" in result else "dim"),
            )  # fmt: skip
    return table


def _speed(result: dict[str, Any]) -> list[str]:
    if "seconds" not in result:
        return ["-"] * 7
    return [
        f"{result['seconds']['median'] * 1e3:.3f}",
        f"{result['tflops']:.0f}",
        f"{result['of_peak']:.0%}",
        _share(result.get("of_ideal")),
        _times(result.get("vs_flex")),
        _times(result.get("vs_sdpa-flash")),
        _times(result.get("vs_sdpa-cudnn")),
    ]


def decode_table(found: list[Found]) -> Table:
    """One row for each contestant of each cell."""
    table = Table(box=None, pad_edge=False)
    for name in ("cache", "keys", "heads", "D", "dtype", "by"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "GB/s", "of copy", "of one alike", "of roof", "× SDPA", "copy GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for one in found:
        cell, values = one["cell"], one["values"]
        for result in values["results"]:
            shown = ["-"] * 6
            if "seconds" in result:
                shown = [
                    f"{result['seconds']['median'] * 1e3:.3f}", f"{result['gbps']:.0f}",
                    f"{result['of_copy']:.0%}", _share(result.get("of_copy_alike")),
                    f"{result['of_roof']:.0%}", _times(result.get("vs_sdpa")),
                ]  # fmt: skip
            table.add_row(
                cell["form"], f"{cell['batch']} x {cell['context']}",
                f"{cell['group'] * cell['kv_heads']}/{cell['kv_heads']}", str(cell["head_dim"]),
                cell["dtype"], result["backend"], *shown, f"{values['copy_gbps']:.0f}",
                Text(_remark(result), style="red" if "failed" in result else "dim"),
            )  # fmt: skip
    return table


def kernel_summary(found: list[Found]) -> list[str]:
    """For each dtype, length, pass and head size: median and least ratios over the masks."""
    lines = []
    names = ("dtype", "length", "direction", "head_dim")
    for which in sorted({tuple(f["cell"][n] for n in names) for f in found}):
        cells = [f for f in found if tuple(f["cell"][n] for n in names) == which]
        parts = []
        if flex := _each(cells, _measured("vs_flex")):
            parts.append(f"x FlexAttention {median(flex):.2f} (least {min(flex):.2f})")
        sparse = [f for f in cells if _SPARSE <= f["values"]["tile_density"] < 1]
        if ideal := _each(sparse, _measured("of_ideal")):
            parts.append(
                f"of ideal, from {_SPARSE:.0%} of the tiles, {median(ideal):.2f} "
                f"(least {min(ideal):.2f})"
            )
        for mask in ("full", "causal"):
            those = [f for f in cells if f["cell"]["mask"] == mask]
            if cudnn := _each(those, _measured("vs_sdpa-cudnn")):
                parts.append(f"{mask} x cuDNN {cudnn[0]:.2f}")
            if mask == "causal" and (peak := _each(those, lambda r: r.get("of_peak"))):
                parts.append(f"{peak[0]:.0%} of the matrix product's rate")
        wrong = sum("failed" in r for f in cells for r in f["values"]["results"] if _ours(r))
        parts.append(f"{wrong} of {len(cells)} cells wrong or failed")
        dtype, length, direction, dim = which
        lines.append(f"triton, {dtype} {direction}, {length} tokens, D={dim}: " + "; ".join(parts))
    return lines


def decode_summary(found: list[Found]) -> list[str]:
    """For each kind of cache the shares of what the GPU can do."""
    lines = []
    for form in dict.fromkeys(f["cell"]["form"] for f in found):
        cells = [f for f in found if f["cell"]["form"] == form]
        parts = []
        for what, value in (
            ("a copy's bandwidth", lambda r: r.get("of_copy")),
            ("a copy of as many bytes", _measured("of_copy_alike")),
            ("the lower roof", lambda r: r.get("of_roof")),
        ):
            if shares := _each(cells, value):
                parts.append(
                    f"{median(shares):.0%} of {what} ({min(shares):.0%}-{max(shares):.0%})"
                )
        if parts:
            lines.append(f"triton, {form} caches: " + ", ".join(parts))
    return lines


def _measured(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda result: result.get(name, {}).get("median")


def _ours(result: dict[str, Any]) -> bool:
    return bool(result["backend"] == "triton")


def _each(found: list[Found], value: Callable[[dict[str, Any]], float | None]) -> list[float]:
    values = (value(r) for f in found for r in f["values"]["results"] if _ours(r))
    return [x for x in values if x is not None]
