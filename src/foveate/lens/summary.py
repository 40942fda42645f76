"""From the records of windows and layers to what is told: figures by layer and head, and the
suggestion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveate.lens.trials import Trial, as_assignment, assigned, best_uniform, fitting, mean, uniform

HEADS = (
    "importance", "sink_share", "entropy", "spread", "distance", "near", "no_op", "sink_cosine",
    "other_cosine", "output_rank", "map_rank",
)  # fmt: skip


def summary(found: dict[str, Any], names: Sequence[str], budget: float) -> dict[str, Any]:
    """Everything as plain data.

    Args:
        found: segments, layers (by window) and similarity (by window) as they were recorded.
        names: the candidates.
        budget: of the assignment.
    """
    windows: dict[int, dict[int, dict[str, Any]]] = {}
    for one in found["layers"]:
        windows.setdefault(one["window"], {})[one["layer"]] = one
    layers = sorted(windows[0])
    tables = {
        name: {str(n): _mean([w[n][name] for w in windows.values()]) for n in layers}
        for name in (*HEADS, "drain")
    }
    density = {
        mass: {str(n): _mean([w[n]["density"][mass] for w in windows.values()]) for n in layers}
        for mass in windows[0][layers[0]]["density"]
    }
    trials = mean(
        [
            {n: {name: Trial(**w[n]["trials"][name]) for name in names} for n in layers}
            for w in windows.values()
        ]
    )
    return {
        "layers": layers,
        "heads": len(tables["entropy"][str(layers[0])]),
        "figures": tables,
        "strongest": {str(n): windows[0][n]["strongest"] for n in layers},
        "density": density,
        "states": {str(n): windows[0][n]["states"] for n in layers},
        "segments": found["segments"],
        "similarity": {
            kind: _mean_table([one[kind] for one in found["similarity"]])
            for kind in ("maps", "apart")
        },
        "fits": {str(n): picks for n, picks in fitting(trials, budget).items()},
        "suggestion": suggested(trials, budget),
        "candidates": {name: _plain(trials, name) for name in names},
    }


def suggested(trials: dict[int, dict[str, Trial]], budget: float) -> dict[str, Any]:
    """The assignment within the budget, beside the best candidate for all heads alike."""
    choice = assigned(trials, budget)
    name = best_uniform(trials, budget)
    alike = None if name is None else uniform(trials, name)
    return {
        "assignment": as_assignment(choice.heads),
        "heads": {str(layer): picks for layer, picks in choice.heads.items()},
        "harm": choice.harm,
        "cost": choice.cost,
        "uniform": name,
        "uniform_harm": None if alike is None else alike.harm,
        "uniform_cost": None if alike is None else alike.cost,
    }


def _plain(trials: dict[int, dict[str, Trial]], name: str) -> dict[str, float]:
    one = uniform(trials, name)
    return {"harm": one.harm, "cost": one.cost}


def _mean(lists: list[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*lists, strict=True)]


def _mean_table(tables: list[list[list[float]]]) -> list[list[float]]:
    return [_mean(list(rows)) for rows in zip(*tables, strict=True)]
