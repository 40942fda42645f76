"""The figure of `foveate cost tiles`: bounds by stride, under what the operations would allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.models.canvas import pyplot_for, save

_WORST, _MEAN, _FLOPS = "#3d5a98", "#9db4dd", "#a4161a"


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    """Write the figure, a panel for each window, as PNG or whatever the path's suffix says.

    Args:
        rows: as `foveate cost tiles --json` prints them.
        path: of the file; its folder is made.

    Raises:
        InputError: a suffix that matplotlib doesn't write.
        MissingPackageError: matplotlib isn't there.
    """
    pyplot = pyplot_for(path)
    windows = list(dict.fromkeys((row["shape"], row["window"]) for row in rows))
    tall = sum(1.1 + 0.42 * sum((r["shape"], r["window"]) == w for r in rows) for w in windows)
    heights = [1 + sum((r["shape"], r["window"]) == w for r in rows) for w in windows]
    figure, axes = pyplot.subplots(
        len(windows), 1, figsize=(8, tall), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis, window in zip(axes[:, 0], windows):
        mine = [row for row in rows if (row["shape"], row["window"]) == window]
        places = range(len(mine))
        axis.barh([p - 0.2 for p in places], [r["parallel"] for r in mine], 0.36, color=_WORST,
                  label="all tiles at once")  # fmt: skip
        axis.barh([p + 0.2 for p in places], [r["serial"] for r in mine], 0.36, color=_MEAN,
                  label="one after another")  # fmt: skip
        axis.axvline(mine[0]["flops"], color=_FLOPS, linewidth=1.2, label="operations")
        axis.set_yticks(
            list(places), [f"{r['stride']}  {r['q_tile']}/{r['kv_tile']}" for r in mine]
        )
        axis.set_ylim(len(mine) - 0.4, -0.6)
        axis.set_title(f"{window[0]}, window {window[1]}", loc="left", fontsize=10)
        axis.set_xlabel("times as fast as dense attention, at most")
        axis.grid(axis="x", alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=3, loc="outside lower center")
    return save(pyplot, figure, path)
