"""The figures: shares of the ideal over density and speed against SDPA; decode over context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.models import canvas

Found = dict[str, Any]
_COLOURS = {"cpu": "#0b6e4f", "sdpa": "#c44900", "blocks": "#3d5a98", "flex": "#8f2d8c"}
_OTHER = "#555555"


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """An empty figure and its axes, (rows, columns); `save` writes it.

    Raises:
        MissingPackageError: matplotlib isn't there.
    """
    found: tuple[Any, Any] = canvas.pyplot().subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained"
    )
    return found


def save(figure: Any, path: Path) -> None:
    """Write a figure and close it."""
    canvas.save(canvas.pyplot(), figure, path)


def kernel_figure(found: list[Found], path: Path) -> Path:
    """Write the figure of `kernels.run`.

    Above, the share of the ideal over the share of tiles that is visited; below, the speed against
    SDPA on the full and causal masks over length. A column for each dtype and pass.

    Raises:
        MissingPackageError: matplotlib isn't there.
    """
    pyplot = canvas.pyplot()
    columns = sorted({(_of(one, "dtype"), _of(one, "direction")) for one in found}, reverse=True)
    figure, axes = pyplot.subplots(
        2, len(columns), figsize=(4.2 * len(columns), 7), squeeze=False, layout="constrained"
    )
    for column, (dtype, direction) in enumerate(columns):
        mine = [o for o in found if (_of(o, "dtype"), _of(o, "direction")) == (dtype, direction)]
        above, below = axes[0][column], axes[1][column]
        above.set_title(f"{dtype} {direction}")
        _densities(above, mine)
        _lengths(below, mine)
    canvas.save(pyplot, figure, path)
    return path


def _densities(axis: Any, found: list[Found]) -> None:
    points: dict[str, list[tuple[float, float]]] = {}
    for one in found:
        if _of(one, "mask") == "full":
            continue
        for result in one["values"]["results"]:
            if "of_ideal" in result:
                at = (one["values"]["tile_density"], result["of_ideal"]["median"])
                points.setdefault(result["backend"], []).append(at)
    for name, pairs in points.items():
        x, y = zip(*pairs)
        axis.scatter(x, y, s=14, alpha=0.7, label=name, color=_COLOURS.get(name, _OTHER))
    axis.axhline(1, color="black", linewidth=0.8)
    if points:
        axis.legend()
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.set_xlim(0, None)
    axis.set(xlabel="share of tiles visited", ylabel="share of the ideal speed", ylim=(0, None))


def _lengths(axis: Any, found: list[Found]) -> None:
    lines: dict[tuple[str, str, int, int], list[tuple[int, float, float, float]]] = {}
    for one in found:
        if _of(one, "mask") not in ("full", "causal"):
            continue
        for result in one["values"]["results"]:
            ratio = result.get("vs_sdpa")
            if ratio is None or result["backend"] == "flex":
                continue
            key = (result["backend"], _of(one, "mask"), _of(one, "head_dim"), _of(one, "threads"))
            at = (_of(one, "length"), ratio["median"], ratio["q20"], ratio["q80"])
            lines.setdefault(key, []).append(at)
    for (name, mask, head_dim, threads), points in lines.items():
        x, y, low, high = zip(*sorted(points))
        colour = _COLOURS.get(name, _OTHER)
        style = "-" if mask == "full" else "--"
        label = f"{name} {mask} D={head_dim} t={threads}"
        marker = "o" if head_dim <= 64 else "s"
        inside = colour if threads == 1 else "white"
        axis.plot(
            x, y, style, marker=marker, markersize=4, markerfacecolor=inside, color=colour,
            label=label,
        )  # fmt: skip
        axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.axhline(1, color="black", linewidth=0.8)
    if lines:
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=7)
    axis.set(xlabel="tokens", ylabel="speed against SDPA", ylim=(0, None))


def decode_figure(found: list[Found], path: Path) -> Path:
    """Write the figure of `decode.run`: share of the lower roof over context, for each group.

    Raises:
        MissingPackageError: matplotlib isn't there.
    """
    pyplot = canvas.pyplot()
    columns = sorted({(_of(one, "dtype"), _of(one, "threads")) for one in found}, key=str)
    figure, axes = pyplot.subplots(
        1, len(columns), figsize=(4.6 * len(columns), 4.2), squeeze=False, layout="constrained"
    )
    for axis, (dtype, threads) in zip(axes[0], columns):
        lines: dict[str, list[tuple[int, float]]] = {}
        for one in found:
            if (_of(one, "dtype"), _of(one, "threads")) != (dtype, threads):
                continue
            ran = [r for r in one["values"]["results"] if "of_roof" in r]
            chosen = [r for r in ran if r["backend"] == "cpu"] or ran
            if not chosen:
                continue
            best = max(chosen, key=lambda r: r["of_roof"]["median"])
            label = f"{best['backend']} {_of(one, 'group')} per KV head, D={_of(one, 'head_dim')}"
            label += "" if _of(one, "form") == "whole" else f", {_of(one, 'form')}"
            at = (_of(one, "context"), best["of_roof"]["median"])
            lines.setdefault(label, []).append(at)
        for label, points in lines.items():
            x, y = zip(*sorted(points))
            axis.plot(x, y, marker="o", markersize=3, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        if lines:
            axis.set_xscale("log", base=2)
            axis.legend(fontsize=7)
        axis.set(xlabel="keys in the cache", ylabel="share of the lower roof", ylim=(0, None))
        axis.set_title(f"{dtype}, {threads} thread(s)")
    canvas.save(pyplot, figure, path)
    return path


def _of(one: Found, name: str) -> Any:
    return one["cell"][name]
