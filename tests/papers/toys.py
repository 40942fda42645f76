"""Miniatures of no paper, that take no time."""

from foveate.ops.errors import InputError
from foveate.papers.harness import Grid, Paper, at_least, at_most


def paper(gap=0.01, noise=0.001, calls=None, fail_at=None, **more):
    """Two arms whose losses differ by `gap`; records its calls, and stops at one of them."""
    calls = [] if calls is None else calls

    def run(trial):
        if fail_at is not None and len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append((trial.cell, trial.seed, trial.tuned, trial.quick))
        trial.tell(0.5, "half way")
        wobble = noise * ((trial.seed * 7) % 3 - 1)
        base = 1.5 + 0.2 * (trial.seed % 5)
        loss = base if trial.cell == "dense" else base + gap + wobble
        return {
            trial.cell: {
                "loss": loss,
                "validation": loss + abs((trial.tuned or 0) - 3),
                "cache": 256.0 if trial.cell == "dense" else 32.0,
                "curve": [[0, 5.0], [10, loss]],
            }
        }

    made = {
        "key": "toy",
        "claim": "A toy loses next to nothing.",
        "metric": "loss in nats",
        "cells": ("dense", "ours"),
        "run": run,
        "baseline": ("dense",),
        "ours": ("ours",),
        "checks": (
            at_most("loss(ours) - loss(dense)",
                    lambda at: at["ours"]["loss"] - at["dense"]["loss"], 0.03),
            at_least("cache(dense) / cache(ours)",
                     lambda at: at["dense"]["cache"] / at["ours"]["cache"], 8, exact=True),
        ),
    }  # fmt: skip
    return Paper(**(made | more))


GRID = Grid("rate", (1, 3, 4))


def breaking():
    """A miniature one of whose cells raises an error."""
    good = paper().run

    def run(trial):
        if trial.cell == "dense":
            raise InputError("dense is broken")
        return good(trial)

    return paper(run=run, again=breaking)
