"""The figures of the report: tables of layers and heads as colours, curves over layers, maps."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from foveate.runs.drawing import SOFT, as_svg, drawing

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A6D00", "#7A7A7A", "#F0E442",
    "#5B3A8C", "#A23B00", "#7FBF7B", "#1c2430", "#C7B9FF", "#FFB3A7", "#3CB3A0", "#B0B0B0",
)  # fmt: skip
Table = Mapping[str, Sequence[float]]


def heat(table: Table, name: str, title: str, high: float | None = None) -> str:
    """A figure for each layer (down) and head (across)."""
    rows = [list(values) for values in table.values()]
    context, figure, axes = drawing(_height(len(rows)))
    shown = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0 if high else None, vmax=high)
    _named_axes(axes, list(table), len(rows[0]), title)
    figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.02)
    return as_svg(context, figure, f"heat-{name}", escape(title))


def square(table: list[list[float]], layers: Sequence[int], name: str, title: str) -> str:
    """A figure for each pair of layers."""
    context, figure, axes = drawing(4.4)
    shown = axes.imshow(table, cmap="viridis", vmin=0, vmax=1)
    _named_axes(axes, [str(n) for n in layers], len(layers), title)
    axes.set_xticks(range(0, len(layers), _step(len(layers))), layers[:: _step(len(layers))])
    axes.set_xlabel("layer")
    figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.02)
    return as_svg(context, figure, f"square-{name}", escape(title))


def chosen(heads: Mapping[str, Sequence[str]], name: str, title: str) -> str:
    """The pattern of each layer and head, in colours."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names = sorted({one for row in heads.values() for one in row})
    rows = [[names.index(one) for one in row] for row in heads.values()]
    context, figure, axes = drawing(_height(len(rows)) + 0.22 * len(names))
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    axes.imshow(rows, aspect="auto", cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) - 0.5)
    _named_axes(axes, list(heads), len(rows[0]), title)
    figure.legend(
        handles=[Patch(color=c, label=one) for c, one in zip(colours, names)],
        loc="outside lower center", ncols=1, fontsize=8.5,
    )  # fmt: skip
    return as_svg(context, figure, f"chosen-{name}", escape(title))


def lines(
    name: str, title: str, unit: str, curves: Mapping[str, Mapping[str, float]], *, log: bool
) -> str:
    """Figures over layers."""
    context, figure, axes = drawing(3.4)
    for i, (label, values) in enumerate(curves.items()):
        axes.plot(
            [int(n) for n in values], list(values.values()), color=COLOURS[i], marker="o",
            markersize=4, linewidth=1.6, label=label,
        )  # fmt: skip
    if log and all(v > 0 for values in curves.values() for v in values.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set_xlabel("layer")
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=11, loc="left")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9.5)
    return as_svg(context, figure, f"lines-{name}", escape(title))


def thumbnail(data: str, cells: int) -> str:
    """A data URI of a head's pooled map, (cells x cells) bytes as base64."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.image import imsave

    level = np.frombuffer(base64.b64decode(data), dtype=np.uint8).reshape(cells, cells)
    out = io.BytesIO()
    imsave(out, colormaps["magma"](level)[..., :3], format="png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _height(rows: int) -> float:
    return min(7.0, max(2.2, 0.9 + 0.12 * rows))


def _step(count: int) -> int:
    return max(1, -(-count // 12))


def _named_axes(axes: Any, layers: Sequence[str], heads: int, title: str) -> None:
    axes.grid(visible=False)
    axes.set_yticks(range(0, len(layers), _step(len(layers))), layers[:: _step(len(layers))])
    axes.set_xticks(range(0, heads, _step(heads)))
    axes.set_ylabel("layer")
    axes.set_xlabel("head")
    axes.set_title(title, fontsize=11, loc="left")
    axes.tick_params(colors=SOFT, length=0)
