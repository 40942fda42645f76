"""Results of a GPU on the screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table
from rich.text import Text

from foveate.bench.show import _remark, _share, _times

Found = dict[str, Any]


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
    for name in ("ms", "GB/s", "of copy", "× SDPA", "copy GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for one in found:
        cell, values = one["cell"], one["values"]
        for result in values["results"]:
            shown = ["-"] * 4
            if "seconds" in result:
                shown = [
                    f"{result['seconds']['median'] * 1e3:.3f}", f"{result['gbps']:.0f}",
                    f"{result['of_copy']:.0%}", _times(result.get("vs_sdpa")),
                ]  # fmt: skip
            table.add_row(
                cell["form"], f"{cell['batch']} x {cell['context']}",
                f"{cell['group'] * cell['kv_heads']}/{cell['kv_heads']}", str(cell["head_dim"]),
                cell["dtype"], result["backend"], *shown, f"{values['copy_gbps']:.0f}",
                Text(_remark(result), style="red" if "failed" in result else "dim"),
            )  # fmt: skip
    return table


def kernel_summary(found: list[Found]) -> list[str]:
    """For each dtype and pass: the least ratios over all masks; causal, the share of the peak."""
    lines = []
    for dtype, direction in sorted({(f["cell"]["dtype"], f["cell"]["direction"]) for f in found}):
        cells = [
            f for f in found if (f["cell"]["dtype"], f["cell"]["direction"]) == (dtype, direction)
        ]
        parts = []
        if flex := _each(cells, lambda r, _: r.get("vs_flex", {}).get("median")):
            parts.append(f"x FlexAttention at least {min(flex):.2f}, median {_middle(flex):.2f}")
        ideal = _each(
            cells,
            lambda r, v: r.get("of_ideal", {}).get("median") if v["tile_density"] < 1 else None,
        )
        if ideal:
            parts.append(f"of ideal at least {min(ideal):.2f}, median {_middle(ideal):.2f}")
        causal = [f for f in cells if f["cell"]["mask"] == "causal"]
        if peak := _each(causal, lambda r, _: r.get("of_peak")):
            parts.append(f"causal up to {max(peak):.0%} of the matrix product's rate")
        wrong = sum("failed" in r for f in cells for r in f["values"]["results"] if _ours(r))
        parts.append(f"{wrong} of {len(cells)} cells wrong or failed")
        lines.append(f"triton, {dtype} {direction}: " + "; ".join(parts))
    return lines


def decode_summary(found: list[Found]) -> list[str]:
    """For each kind of cache the share of a copy's bandwidth."""
    lines = []
    for form in dict.fromkeys(f["cell"]["form"] for f in found):
        shares = _each(
            [f for f in found if f["cell"]["form"] == form], lambda r, _: r.get("of_copy")
        )
        if shares:
            lines.append(
                f"triton, {form} caches: {min(shares):.0%} to {max(shares):.0%} of a copy's "
                f"bandwidth, median {_middle(shares):.0%}"
            )
    return lines


def _ours(result: dict[str, Any]) -> bool:
    return bool(result["backend"] == "triton")


def _each(
    found: list[Found], value: Callable[[dict[str, Any], dict[str, Any]], float | None]
) -> list[float]:
    values = (value(r, f["values"]) for f in found for r in f["values"]["results"] if _ours(r))
    return [x for x in values if x is not None]


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
