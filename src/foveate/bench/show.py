"""Results on the screen: tables, and what they come to."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from foveate.runs.timing import spread

Found = dict[str, Any]  # {"cell": ..., "values": ...}


def kernel_tables(found: list[Found]) -> Iterator[Table]:
    """One table for each dtype, pass, head size and number of threads."""
    names = ("dtype", "direction", "head_dim", "threads")

    def group(one: Found) -> tuple[Any, ...]:
        return tuple(one["cell"][name] for name in names)

    for (dtype, direction, head_dim, threads), cells in itertools.groupby(
        sorted(found, key=lambda one: tuple(map(str, group(one)))), group
    ):
        title = f"{direction}, {dtype}, head size {head_dim}, {threads} thread(s)"
        yield _kernel_table(title, cells)


def _kernel_table(title: str, cells: Iterable[Found]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("mask", "tokens", "tile", "by"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "GFLOP/s", "× SDPA", "× flex", "of ideal", "pairs", "tiles", "layout ms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for one in cells:
        cell, values = one["cell"], one["values"]
        for result in values["results"]:
            table.add_row(
                cell["mask"], str(cell["length"]), str(cell["tile"]), result["backend"],
                *_speed(result),
                f"{values['density']:.1%}", f"{values['tile_density']:.1%}",
                f"{values['layout_seconds']['median'] * 1e3:.1f}",
                Text(_remark(result), style="red" if "failed" in result else "dim"),
            )  # fmt: skip
    return table


def _speed(result: dict[str, Any]) -> list[str]:
    if "seconds" not in result:
        return ["-"] * 5
    return [
        f"{result['seconds']['median'] * 1e3:.2f}",
        f"{result['tflops'] * 1e3:.0f}",
        _times(result.get("vs_sdpa")),
        _times(result.get("vs_flex")),
        _share(result.get("of_ideal")),
    ]


def _times(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f}"


def _share(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f} ({ratio['q20']:.2f}-{ratio['q80']:.2f})"


def _remark(result: dict[str, Any]) -> str:
    if "declined" in result:
        return " ".join(f"can't: {result['declined']}".split())
    if "failed" in result:
        return " ".join(result["failed"].split())
    if "compile_seconds" in result:
        return f"compiled in {result['compile_seconds']:.1f} s"
    return ""


def decode_table(found: list[Found]) -> Table:
    """One row for each contestant of each cell; the roofs stand in each cell's first row."""
    table = Table(box=None, pad_edge=False)
    for name in ("keys", "cache", "heads", "D", "dtype", "thr", "by"):
        table.add_column(name, no_wrap=True)
    for name in (
        "ms", "GB/s", "GFLOP/s", "of roof", "in cache", "× SDPA", "× rows", "read GB/s",
        "GEMM GFLOP/s", "limit",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for one in found:
        cell, values = one["cell"], one["values"]
        roofs = [f"{values['read_gbps']:.1f}", f"{values['product_gflops']:.0f}", values["bound"]]
        for result in values["results"]:
            table.add_row(
                str(cell["context"]), cell["form"],
                f"{cell['group'] * cell['kv_heads']}/{cell['kv_heads']}",
                str(cell["head_dim"]), cell["dtype"], str(cell["threads"]), result["backend"],
                *_step(result), *roofs,
                Text(_remark(result), style="red" if "failed" in result else "dim"),
            )  # fmt: skip
            roofs = ["", "", ""]
    return table


def _step(result: dict[str, Any]) -> list[str]:
    if "seconds" not in result:
        return ["-"] * 7
    return [
        f"{result['seconds']['median'] * 1e3:.3f}",
        f"{result['gbps']:.1f}",
        f"{result['gflops']:.1f}",
        _share(result["of_roof"]),
        _times(result.get("of_near_roof")),
        _times(result.get("vs_sdpa")),
        _times(result.get("vs_sdpa-rows")),
    ]


def projection_table(found: list[Found]) -> Table:
    """One row for each projection of each cell."""
    table = Table(box=None, pad_edge=False)
    for name in ("tokens", "dim", "heads", "dtype", "thr", "projection"):
        table.add_column(name, no_wrap=True)
    for name in ("numbers/token", "MiB", "ms", "× base", "attention ms", "GB/s", "of read"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for one in found:
        cell = one["cell"]
        sizes = [str(cell[name]) for name in ("context", "dim", "heads", "dtype", "threads")]
        for result in one["values"]["results"]:
            figures = ["-"] * 7
            if "seconds" in result:
                figures = [
                    str(result["elements"]),
                    f"{result['bytes'] / 2**20:.1f}",
                    f"{result['seconds']['median'] * 1e3:.3f}",
                    _times(result.get("vs_base")),
                    f"{result['attend_seconds']['median'] * 1e3:.3f}",
                    f"{result['gbps']:.1f}",
                    _share(result["of_read"]),
                ]
            table.add_row(
                *sizes, result["projection"], *figures,
                Text(_remark(result), style="red" if "failed" in result else "dim"),
            )  # fmt: skip
    return table


def neighborhood_table(found: list[Found]) -> Table:
    """One row for each form of each cell; the bound stands in each cell's first row."""
    table = Table(box=None, pad_edge=False)
    for name in ("grid", "window", "stride", "D", "dtype", "thr", "tiles", "form"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "× naive", "× dense", "bound ×", "of bound"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for one in found:
        cell, values = one["cell"], one["values"]
        setting = cell["setting"]
        sizes = [_by(setting[name]) for name in ("shape", "window", "stride")]
        sizes += [str(cell[name]) for name in ("head_dim", "dtype", "threads")]
        sizes.append(f"{_by(values['q_tile'])}/{_by(values['kv_tile'])}")
        bound = f"{values['bound']:.2f}"
        for result in values["results"]:
            figures = ["-"] * 3
            if "seconds" in result:
                figures = [
                    f"{result['seconds']['median'] * 1e3:.2f}",
                    _times(result.get("vs_naive")),
                    _times(result["vs_dense"]),
                ]
            table.add_row(
                *sizes, result["form"], *figures, bound, _share(result.get("of_bound")),
                Text(_remark(result), style="red" if "failed" in result else "dim"),
            )  # fmt: skip
            sizes, bound = [""] * len(sizes), ""
    return table


def _by(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))


def summary(found: list[Found], by: str) -> list[str]:
    """What the cells of a backend come to: a line for each dtype, pass, threads and question.

    Args:
        found: cells of `kernels.run`.
        by: the backend.
    """
    lines = []
    groups = sorted({(_of(one, "dtype"), _of(one, "direction"), _of(one, "threads"))
                     for one in found}, key=str)  # fmt: skip
    for group in groups:
        mine = [
            (one, result)
            for one in found
            if (_of(one, "dtype"), _of(one, "direction"), _of(one, "threads")) == group
            for result in one["values"]["results"]
            if result["backend"] == by and "seconds" in result
        ]
        plain = [r["vs_sdpa"]["median"] for one, r in mine
                 if _of(one, "mask") in ("full", "causal") and "vs_sdpa" in r]  # fmt: skip
        sparse = [r["of_ideal"]["median"] for one, r in mine if _sparse(one) and "of_ideal" in r]
        flex = [r["vs_flex"]["median"] for _, r in mine if "vs_flex" in r]
        head = f"{by}, {group[0]} {group[1]}, {group[2]} thread(s):"
        for what, values in (
            ("times SDPA's speed, full and causal", plain),
            ("of the ideal, 10-50% of tiles and 8 or more a row", sparse),
            ("times compiled FlexAttention's speed", flex),
        ):
            if values:
                lines.append(
                    f"{head} {spread(values)['median']:.2f} {what} "
                    f"(median of {len(values)}, worst {min(values):.2f})"
                )
    return lines


def _of(one: Found, name: str) -> Any:
    return one["cell"][name]


def _sparse(one: Found) -> bool:
    values = one["values"]
    inside = 0.0999 <= values["tile_density"] <= 0.55 and values["tiles_per_row"] >= 8
    return inside and _of(one, "mask") not in ("full", "causal")


def decode_summary(found: list[Found], by: str) -> list[str]:
    """What the cells of a backend come to, for each dtype, number of threads and kind of cache."""
    lines = []

    def group(one: Found) -> tuple[Any, ...]:
        return _of(one, "dtype"), _of(one, "threads"), _of(one, "form")

    for dtype, threads, form in sorted({group(one) for one in found}, key=str):
        mine = [
            result["of_roof"]["median"]
            for one in found
            if group(one) == (dtype, threads, form)
            for result in one["values"]["results"]
            if result["backend"] == by and "seconds" in result
        ]
        if mine:
            lines.append(
                f"{by}, decode {dtype}, {threads} thread(s), {form} cache: "
                f"{spread(mine)['median']:.2f} of the lower roof "
                f"(median of {len(mine)}, worst {min(mine):.2f})"
            )
    return lines
