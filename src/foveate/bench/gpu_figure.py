"""The figure of a GPU: useful operations in a second over the share of tiles that is visited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.models import canvas

Found = dict[str, Any]
_LOOK = {"triton": ("#0b6e4f", "o"), "flex": ("#8f2d8c", "x")}


def gpu_kernel_figure(found: list[Found], path: Path) -> Path:
    """Write the figure of `gpu_kernels.run`, a row for each pass and a column for each head size.

    A dot is a mask; the line is the best dense kernel on everything, which a sparse mask would
    reach if visited tiles cost as much as its own and all of their elements counted.

    Raises:
        MissingPackageError: matplotlib isn't there.
    """
    pyplot = canvas.pyplot()
    rows = sorted({one["cell"]["direction"] for one in found}, reverse=True)
    columns = sorted({one["cell"]["head_dim"] for one in found})
    figure, axes = pyplot.subplots(
        len(rows), len(columns), figsize=(4.6 * len(columns), 3.6 * len(rows)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for i, direction in enumerate(rows):
        for j, head_dim in enumerate(columns):
            mine = [
                one
                for one in found
                if (one["cell"]["direction"], one["cell"]["head_dim"]) == (direction, head_dim)
            ]
            axes[i][j].set_title(f"{direction}, head size {head_dim}")
            _rates(axes[i][j], mine)
    canvas.save(pyplot, figure, path)
    return path


def _rates(axis: Any, found: list[Found]) -> None:
    for name, (colour, marker) in _LOOK.items():
        points = [
            (one["values"]["tile_density"], result["tflops"])
            for one in found
            for result in one["values"]["results"]
            if result["backend"] == name and "tflops" in result
        ]
        if points:
            x, y = zip(*points)
            axis.scatter(x, y, s=18, alpha=0.8, color=colour, marker=marker, label=name)
    dense = [
        max((r.get("tflops", 0.0) for r in one["values"]["results"]), default=0.0)
        for one in found
        if one["cell"]["mask"] == "full"
    ]
    if dense:
        axis.axhline(max(dense), color="black", linewidth=0.8, linestyle="--", label="best dense")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.set(xlabel="share of tiles visited", ylabel="useful TFLOP/s", ylim=(0, None))
    axis.legend(fontsize=8)
