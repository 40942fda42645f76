"""Figures of `foveate circuits`: who writes for whom, and what a task lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.models.canvas import pyplot_for, save

_WORDS = {"q": "query", "k": "key", "v": "value"}


def draw(facts: dict[str, Any], folder: Path) -> list[Path]:
    """Write composition.png, and task.png where a task was run.

    Args:
        facts: as `Circuits` returns them.
        folder: made if it isn't there.

    Raises:
        MissingPackageError: matplotlib isn't there.
    """
    files = [_maps(facts, folder / "composition.png")]
    if "task" in facts:
        files.append(_task(facts["task"], folder / "task.png"))
    return files


def _maps(facts: dict[str, Any], path: Path) -> Path:
    """Early heads in rows, later ones in columns: whole heads, and the best component's z."""
    pyplot = pyplot_for(path)
    kinds = list(facts["maps"])
    figure, axes = pyplot.subplots(
        2, len(kinds), figsize=(4.6 * len(kinds), 8.4), squeeze=False, layout="constrained"
    )
    each = facts["heads"] / facts["layers"]
    ticks = [each * (layer + 0.5) - 0.5 for layer in range(facts["layers"])]
    shown = list(range(0, facts["layers"], max(1, facts["layers"] // 10)))
    for column, kind in enumerate(kinds):
        rows = (
            ("whole", f"whole heads into the {_WORDS[kind]}", None),
            ("component", f"best component into the {_WORDS[kind]} (z)", 3.0),
        )
        for row, (name, title, least) in enumerate(rows):
            axis = axes[row, column]
            matrix = [
                [float("nan") if x is None else x for x in line]
                for line in facts["maps"][kind][name]
            ]
            image = axis.imshow(matrix, cmap="viridis", vmin=least, interpolation="nearest")
            figure.colorbar(image, ax=axis, shrink=0.75)
            axis.set_title(title, loc="left", fontsize=10)
            axis.set_xticks([ticks[n] for n in shown], [str(n) for n in shown])
            axis.set_yticks([ticks[n] for n in shown], [str(n) for n in shown])
            axis.set(xlabel="layer of the later head", ylabel="layer of the early head")
    return save(pyplot, figure, path)


def _task(task: dict[str, Any], path: Path) -> Path:
    """Each mover's inhibition without single components, steering, and accuracy by list length."""
    pyplot = pyplot_for(path)
    lists = "by_items" in task
    figure, axes = pyplot.subplots(
        1, 2 + lists, figsize=(11 + 4.6 * lists, 1.4 + 0.3 * sum(
            3 + len(m["components"]) for m in task["movers"])), squeeze=False, layout="constrained",
    )  # fmt: skip
    names, values, colours = [], [], []
    for mover in task["movers"]:
        names.append(f"{mover['head']} as it is")
        values.append(mover["inhibition"])
        colours.append("#555555")
        for one in mover["components"]:
            names.append(f"without {one['channel'].partition(' ->')[0]}")
            values.append(one["inhibition_without"])
            colours.append("#3d5a98")
        for name, key in (("without all of these", "all"), ("without random ones", "control")):
            names.append(name)
            values.append(mover[key]["inhibition_without"])
            colours.append("#0b6e4f" if key == "all" else "#b08900")
    axis = axes[0, 0]
    axis.barh(range(len(names)), values, color=colours)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("attention to the answer minus that to another")
    axis.set_title(f"{task['name']}: what movers are told", loc="left", fontsize=10)
    axis, steered = axes[0, 1], task["movers"][0]["steered"]
    for number, line in enumerate(zip(*steered["attention"])):
        axis.plot(steered["times"], line, marker="o", markersize=3, label=f"word {number + 1}")
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel=f"{steered['channel']}, times what it is", ylabel="attention")
    axis.set_title(f"{task['movers'][0]['head']}, steered", loc="left", fontsize=10)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    if lists:
        axis = axes[0, 2]
        items = [int(n) for n in task["by_items"]]
        axis.plot(items, list(task["by_items"].values()), marker="o", label="as it is")
        one = task["rescaled"]
        axis.plot(
            [items[-1]], [one["test"]], marker="s", linestyle="",
            label=f"{len(one['components'])} components times {one['factor']:g}",
        )  # fmt: skip
        axis.plot(items, [1 / n for n in items], linestyle=":", color="grey", label="chance")
        axis.set(xlabel="objects listed", ylabel="accuracy", ylim=(0, 1.02))
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return save(pyplot, figure, path)
