"""MInference's offline search as a fit: which pattern and budget each head of a model gets."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from foveate.methods.mminference.assigned import MMInference
from foveate.methods.mminference.search import SPACES, HeadSearch, Searcher, Trial, chosen
from foveate.parts.fitting import Artefact, Batch, Batches, Frozen, Progress, State


@torch.no_grad()
def fit(
    method: MMInference, model: Frozen, batches: Batches, progress: Progress, state: State
) -> Artefact:
    """Try the candidates on every head of the model's own attention to a few prompts.

    The prompts are those that look for something far back, as the paper's do (its search runs on
    one of 30,000 tokens). Cut off, it goes on with the layer that it was at.

    Returns:
        Facts only: "layers", {layer: {pattern: heads}}; "search", each head's error and its share
        of the target's area; "held_out", their means.
    """
    names = SPACES[method.space]
    setting = {
        "model": model.fingerprint, "text": batches.describe(), "candidates": list(names),
        "target": None if method.target is None else list(method.target),
        "prompts": method.prompts,
    }  # fmt: skip
    searcher, first, done = Searcher(names, method.target), 0, []
    kept = state.load()
    if kept is not None and kept[0]["setting"] == setting:
        searcher.found = restored(kept[0]["found"])
        first, done = kept[0]["prompt"], kept[0]["done"]
    total = method.prompts * len(model.layers)

    def layer_done(number: int, finished: list[int], layer: int) -> None:
        finished.append(layer)
        at = (number * len(model.layers) + len(finished)) / total
        kept = {"setting": setting, "prompt": number, "done": finished}
        state.save(kept | {"found": stored(searcher.found)}, {})
        progress(at, f"layer {layer}, prompt {number + 1} of {method.prompts}")

    for number in range(first, method.prompts):
        finished: list[int] = done if number == first else []
        searcher.skip = frozenset(finished)
        searcher.layer_done = partial(layer_done, number, finished)
        batch = batches.train(number)
        row = _row(batch)
        model.run(batch.ids[row : row + 1], searcher)
    best = {place: found.best for place, found in searcher.found.items()}
    shares = {
        place: best[place].area / max(1.0, found.target) for place, found in searcher.found.items()
    }
    facts: dict[str, Any] = setting | {
        "layers": {str(layer): heads for layer, heads in chosen(searcher.found).items()},
        "search": {
            f"{layer}.{head}": {"error": trial.error, "cost": shares[layer, head]}
            for (layer, head), trial in best.items()
        },
        "held_out": {
            "mean error": sum(t.error for t in best.values()) / max(1, len(best)),
            "cost of the target": sum(shares.values()) / max(1, len(shares)),
        },
    }
    return Artefact("mminference", facts)


def _row(batch: Batch) -> int:
    """The sequence that looks for something, if there is one."""
    return batch.task.index("retrieval") if "retrieval" in batch.task else 0


def stored(found: dict[tuple[int, int], HeadSearch]) -> list[Any]:
    """What was found so far as JSON data."""
    return [
        [layer, head, one.target,
         {name: [[t.pattern, t.error, t.area] for t in trials]
          for name, trials in one.trials.items()}]
        for (layer, head), one in found.items()
    ]  # fmt: skip


def restored(data: list[Any]) -> dict[tuple[int, int], HeadSearch]:
    """The opposite of `stored`."""
    return {
        (layer, head): HeadSearch(
            target, {name: [Trial(*one) for one in many] for name, many in trials.items()}
        )
        for layer, head, target, trials in data
    }
