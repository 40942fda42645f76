"""Figures of `foveate cost decode` and `foveate cost afd`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveate.cost.hardware import Chip
from foveate.cost.pipeline import NAMES, Played
from foveate.models.canvas import pyplot_for, save

_STAGES = ("#3d5a98", "#9db4dd", "#a4161a", "#e5989b")


def draw_decode(
    rows: Sequence[dict[str, Any]],
    choices: Sequence[dict[str, Any]],
    chips: Sequence[Chip],
    path: Path,
) -> Path:
    """Cost over context, and attention on the roofline of every chip.

    Args:
        rows, choices: "models" and "choices" of `foveate cost decode --json`.
        chips: whose roofs are drawn.
        path: of the file; its suffix says the kind.

    Raises:
        InputError: a suffix that matplotlib doesn't write.
        MissingPackageError: matplotlib isn't there.
    """
    pyplot = pyplot_for(path)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    names = list(dict.fromkeys(row["model"] for row in rows))
    colours = dict(zip(names, pyplot.cm.tab10.colors * (len(names) // 10 + 1)))
    for name in names:
        mine = [row for row in choices if row["model"] == name]
        left.plot([r["context"] for r in mine], [r["usd"] for r in mine], "o-", markersize=4,
                  color=colours[name], label=name)  # fmt: skip
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xlabel("tokens in the cache")
    left.set_ylabel("USD for a million tokens")
    left.set_title("Attention and FFN on the cheapest chip each", loc="left", fontsize=10)
    left.grid(alpha=0.3)
    left.legend(fontsize=7)
    found = [row["intensity"] for row in rows]
    low = min(1.0, *found, *(chip.balance / 4 for chip in chips))
    high = 2 * max(*found, *(chip.balance for chip in chips))
    for chip, dash in zip(chips, ("-", "--", "-.", ":") * len(chips)):
        ridge = chip.balance
        right.plot([low, ridge, high], [low * chip.bandwidth, chip.peak, chip.peak], dash,
                   color="0.35", linewidth=1.2, label=chip.name)  # fmt: skip
        for name in names:
            points = {row["intensity"] for row in rows if row["model"] == name}
            right.plot(list(points), [min(x * chip.bandwidth, chip.peak) for x in points], "o",
                       markersize=4, color=colours[name])  # fmt: skip
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("operations of attention for each byte of cache")
    right.set_ylabel("operations a second, at most")
    right.set_title("Attention on the roofline", loc="left", fontsize=10)
    right.grid(alpha=0.3)
    right.legend(fontsize=7, loc="lower right")
    return save(pyplot, figure, path)


def draw_pipeline(played: Played, rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """The first layers of a simulation, resource by resource; throughput over context if known.

    Args:
        played: what `simulate` saw.
        rows: "contexts" of `foveate cost afd --json`; may be empty.
        path: of the file; its suffix says the kind.

    Raises:
        InputError: a suffix that matplotlib doesn't write.
        MissingPackageError: matplotlib isn't there.
    """
    pyplot = pyplot_for(path)
    many = 2 if rows else 1
    figure, axes = pyplot.subplots(1, many, figsize=(6.5 * many, 3.6), squeeze=False,
                                   layout="constrained")  # fmt: skip
    axis = axes[0, 0]
    first = [e for e in played.events if e.token == 0 and e.layer < 4]
    lanes = sorted({(e.stage, e.instance) for e in first})
    for e in first:
        at = lanes.index((e.stage, e.instance))
        axis.barh(at, (e.end - e.start) * 1e6, left=e.start * 1e6, height=0.7,
                  color=_STAGES[e.stage], edgecolor="white", linewidth=0.6)  # fmt: skip
        axis.text((e.start + e.end) * 5e5, at, str(e.micro_batch + 1), ha="center", va="center",
                  fontsize=6, color="white")  # fmt: skip
    axis.set_yticks(range(len(lanes)),
                    [f"{NAMES[s]}{f' {i + 1}' if i else ''}" for s, i in lanes])  # fmt: skip
    axis.invert_yaxis()
    axis.set_xlabel("µs; numbers are micro-batches")
    axis.set_title("From a standing start, up to four layers", loc="left", fontsize=10)
    if rows:
        right, done = axes[0, 1], [r for r in rows if r["per_chip"] is not None]
        right.plot([r["context"] for r in done], [r["per_chip"] for r in done], "o-",
                   color=_STAGES[0])  # fmt: skip
        for r in done:
            right.annotate(f"{r['attention']}A{r['ffn']}F", (r["context"], r["per_chip"]),
                           textcoords="offset points", xytext=(4, 4), fontsize=7)  # fmt: skip
        right.set_xscale("log", base=2)
        right.set_xlabel("tokens in the cache")
        right.set_ylabel("tokens a second for each chip")
        right.set_title("Fewest attention instances", loc="left", fontsize=10)
        right.grid(alpha=0.3)
    return save(pyplot, figure, path)
