"""The figure of a verdict: every arm by seed, every check against its threshold, and the curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from foveate.models.canvas import pyplot, save
from foveate.papers.harness.run import Result
from foveate.papers.harness.verdict import Outcome

_COLOURS = {"holds": "#0b6e4f", "refuted": "#a4161a", "inconclusive": "#b08900"}
_BASELINE, _OURS = "#555555", "#3d5a98"
COLUMNS = 3


def draw(result: Result, path: Path) -> Path:
    """Write the figure as a PNG, or whatever the path's suffix says.

    Raises:
        MissingPackageError: matplotlib isn't there.
    """
    plot = pyplot()
    verdict = result.verdict
    arms = verdict["baseline"] | verdict["ours"]
    metrics = list(dict.fromkeys(metric for found in arms.values() for metric in found))
    curves = _curves(result)
    if result.paper.grid is not None:
        metrics = [metric for metric in metrics if metric != result.paper.grid.metric]
    panels = len(metrics) + bool(curves)
    columns = max(1, min(panels, COLUMNS))
    rows = -(-panels // columns)
    sampled = sum(not one.check.exact for one in result.outcomes)
    heights = [0.8 + 0.3 * len(arms)] * rows + [0.8 + 0.25 * sampled] * bool(sampled)
    figure = plot.figure(figsize=(5.2 * columns, sum(heights) + 0.6), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    axes = [figure.add_subplot(grid[divmod(at, columns)]) for at in range(panels)]
    for axis, metric in zip(axes, metrics):
        _arms(axis, metric, verdict)
    if curves:
        _lines(axes[-1], curves, result.paper.axes)
    if sampled:  # over the whole width: its rows have long names
        _checks(figure.add_subplot(grid[rows, :]), result)
    figure.suptitle(f"{verdict['key']}: {verdict['verdict']}", x=0.01, ha="left")
    return save(plot, figure, path)


def _arms(axis: Any, metric: str, verdict: dict[str, Any]) -> None:
    rows = [
        (arm, found[metric], colour)
        for kind, colour in (("baseline", _BASELINE), ("ours", _OURS))
        for arm, found in verdict[kind].items()
        if metric in found
    ]
    for row, (_, found, colour) in enumerate(rows):
        axis.scatter(found["values"], [row] * len(found["values"]), s=16, color=colour, alpha=0.6)
        axis.plot([found["mean"]] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2)
    axis.set_yticks(range(len(rows)), [arm for arm, _, _ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(metric)
    axis.grid(axis="x", alpha=0.3)


def _checks(axis: Any, result: Result) -> None:
    """The interval of each check that isn't counted, good to the left of its threshold.

    Checks have different units, so each row has a scale of its own: the threshold is at 0, what
    lies farthest from it at -1 or 1. The numbers stand beside it, the point of refutation is dotted
    where it isn't the threshold.
    """
    rows = [one for one in result.outcomes if not one.check.exact]
    for row, one in enumerate(rows):
        found, colour = one.found, _COLOURS[one.verdict]
        values, ends = _away(one, found.values), _away(one, (found.low, found.high))
        refuted = _away(one, () if one.check.refuted is None else (one.check.refuted,))
        scale = max(map(abs, (*values, *ends, *refuted))) or 1.0
        axis.scatter(
            [v / scale for v in values], [row] * len(values), s=16, color=colour, alpha=0.6
        )
        if ends:
            axis.plot([end / scale for end in ends], [row, row], color=colour, linewidth=2)
        for point in refuted:
            at = [point / scale] * 2
            axis.plot(at, [row - 0.3, row + 0.3], color=_COLOURS["refuted"], linestyle=":")
        said = f"{found.mean:.3g}"
        if ends:
            said += f" ({found.low:.3g} to {found.high:.3g})"
        axis.text(1.02, row, said, va="center", fontsize=7, transform=axis.get_yaxis_transform())
    axis.axvline(0, color="black", linewidth=0.8)
    names = [("needs " if one.need else "") + one.check.text for one in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(-1.1, 1.1)
    axis.set_xticks([0], ["threshold"])
    axis.set_xlabel("good is left; each row has its own scale")


def _away(one: Outcome, figures: tuple[float, ...]) -> list[float]:
    """How far figures that are finite lie beyond a check's threshold, bad being positive."""
    sign = -1 if one.check.at_least else 1
    return [sign * (f - one.check.holds) for f in figures if math.isfinite(f)]


def _curves(result: Result) -> dict[str, list[tuple[float, float]]]:
    """The mean curve of each arm that has one."""
    found: dict[str, list[list[list[float]]]] = {}
    for seed in result.seeds.values():
        for arm, metrics in seed.items():
            if "curve" in metrics:
                found.setdefault(arm, []).append(metrics["curve"])
    return {
        arm: [(points[0][0], sum(y for _, y in points) / len(points)) for points in zip(*curves)]
        for arm, curves in found.items()
    }


def _lines(axis: Any, curves: dict[str, list[tuple[float, float]]], axes: tuple[str, str]) -> None:
    for arm, points in curves.items():
        axis.plot(*zip(*points), marker="o", markersize=3, label=arm)
    axis.set(xlabel=axes[0], ylabel=f"{axes[1]}, mean of the seeds")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
