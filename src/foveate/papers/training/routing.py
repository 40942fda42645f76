"""Routing over a training: entropy, load and fluctuation of every router, on the same tokens.

    watch = RoutingWatch(task, folder)
    done = train(model, task, regime, folder=folder, watch=watch)
    watch.to_the_end()                      {step: Fluctuation from there to the last evaluation}

Taken at each evaluation in eval mode (no dropout, no noise), on tokens of the validation split.
Choices are kept beside the checkpoints, so that a training that is resumed compares with them.
See `foveate.parts.routes` for the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from foveate.models.canvas import pyplot, save
from foveate.nn import Router
from foveate.ops.errors import InputError, MissingPackageError
from foveate.papers.tasks.base import Task
from foveate.papers.training.objective import logits_of
from foveate.parts.routes import Fluctuation, entropy, fluctuation, unevenness

ROUTING = "routing.png"
Choices = dict[str, Tensor]  # "best" (layers, N) int64, "chosen" (layers, N, E) bool


class RoutingWatch:
    """Watches a model's routers; see the module's text.

    Args:
        task: whose validation split gives the tokens.
        folder: keeps what was chosen at each evaluation; None keeps it in memory alone.
        sequences: of that split, at most.
        padding: id of what isn't looked at; None is that every token counts.
    """

    def __init__(
        self,
        task: Task,
        folder: Path | None = None,
        sequences: int = 32,
        padding: int | None = None,
    ) -> None:
        self.inputs = next(iter(task.held_out("validation", sequences))).inputs
        flat = self.inputs.flatten()
        self.real = torch.ones_like(flat, dtype=torch.bool) if padding is None else flat != padding
        self.folder = None if folder is None else folder / "routes"
        self._kept: dict[int, Choices] = {}

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Figures at a step, each a mean over the layers with experts.

        Returns:
            routing entropy in nats, and as a share of ln E; load unevenness (coefficient of
            variation); from the second evaluation on the shares of tokens whose best expert, and
            whose set of experts, changed since the one before.

        Raises:
            InputError: the model has no router.
        """
        found, choices = self.look(model)
        before = self._before(step)
        if before is not None:
            moved = compare(before, choices)
            found |= {"routing_best_changed": moved.best, "routing_set_changed": moved.chosen}
        self._keep(step, choices)
        return found

    @torch.no_grad()
    def look(self, model: nn.Module) -> tuple[dict[str, float], Choices]:
        """Entropy and load now, and what is chosen for each token."""
        seen: dict[nn.Module, Any] = {}
        routers = [m for m in model.modules() if isinstance(m, Router)]
        if not routers:
            raise InputError("RoutingWatch: the model has no router; give it layers with experts.")
        hooks = [
            router.register_forward_hook(lambda router, _, routed: seen.update({router: routed}))
            for router in routers
        ]
        training = model.training
        model.eval()
        try:
            logits_of(model(self.inputs.to(next(model.parameters()).device)))
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
        probs = [seen[r].probs.flatten(0, -2).double().cpu()[self.real] for r in routers]
        chosen = [seen[r].chosen.flatten(0, -2).cpu()[self.real] for r in routers]
        weights = [seen[r].weights.flatten(0, -2).cpu()[self.real] for r in routers]
        own = [entropy(p).mean().item() for p in probs]
        figures = {
            "routing_entropy": fmean(own),
            "routing_entropy_share": fmean(
                h / math.log(max(2, p.shape[-1])) for h, p in zip(own, probs)
            ),
            "load_unevenness": fmean(unevenness(c) for c in chosen),
        }
        best = torch.stack([w.argmax(-1) for w in weights])
        return figures, {"best": best, "chosen": torch.stack(chosen)}

    def to_the_end(self) -> dict[int, Fluctuation]:
        """By step of each evaluation but the last: what changed from there to the last one."""
        self._read()
        *earlier, last = sorted(self._kept) or [0]
        return {step: compare(self._kept[step], self._kept[last]) for step in earlier}

    def _before(self, step: int) -> Choices | None:
        self._read()
        for later in [s for s in self._kept if s >= step]:  # of a run that was stopped after them
            del self._kept[later]
        return self._kept[max(self._kept)] if self._kept else None

    def _read(self) -> None:
        if self._kept or self.folder is None:
            return
        from safetensors.torch import load_file

        for path in sorted(self.folder.glob("routes-*.safetensors")):
            held = load_file(path)
            self._kept[int(path.stem.partition("-")[2])] = {
                "best": held["best"].long(), "chosen": held["chosen"].bool(),
            }  # fmt: skip

    def _keep(self, step: int, choices: Choices) -> None:
        self._kept[step] = choices
        if self.folder is None:
            return
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / ".new"
        save_file({"best": choices["best"].short(), "chosen": choices["chosen"]}, new)
        new.replace(self.folder / f"routes-{step:06d}.safetensors")


def compare(before: Choices, after: Choices) -> Fluctuation:
    """The mean over layers of what changed."""
    layers = [
        fluctuation((b, c), (later, sets))
        for b, c, later, sets in zip(
            before["best"], before["chosen"], after["best"], after["chosen"]
        )
    ]
    return Fluctuation(fmean(f.best for f in layers), fmean(f.chosen for f in layers))


def routing_facts(
    watch: RoutingWatch,
    history: list[dict[str, float]],
    path: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What `foveate train` tells of routing, and its figure where matplotlib is there.

    Args:
        watch: of the training.
        history: of the training.
        path: of the figure.
        say: hears why there is none.

    Returns:
        The last evaluation's entropy and load, what changed from each evaluation to the end, and
        the figure's path or None.
    """
    end = watch.to_the_end()
    names = ("routing_entropy", "routing_entropy_share", "load_unevenness")
    figure: str | None = None
    try:
        figure = str(draw(history, end, path))
    except MissingPackageError as error:
        say(str(error))
    return {name: history[-1][name] for name in names if history} | {
        "changed_to_the_end": {
            str(step): {"best": moved.best, "set": moved.chosen} for step, moved in end.items()
        },
        "figure": figure,
    }


def draw(history: list[dict[str, float]], end: dict[int, Fluctuation], path: Path) -> Path:
    """Entropy, load and fluctuation by step, as a PNG or whatever the path's suffix says.

    Args:
        history: of a training with a `RoutingWatch`.
        end: as `RoutingWatch.to_the_end` gives it.
        path: of the figure.

    Raises:
        MissingPackageError: matplotlib isn't there.
    """
    plot = pyplot()
    figure, axes = plot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    steps = [entry["step"] for entry in history]
    axes[0].plot(steps, [e["routing_entropy_share"] for e in history], marker="o", markersize=3)
    axes[0].set(xlabel="step", ylabel="routing entropy / ln E")
    axes[1].plot(steps, [e["load_unevenness"] for e in history], marker="o", markersize=3)
    axes[1].set(xlabel="step", ylabel="load: std / mean of the experts' counts")
    for name, label in (("best", "best expert"), ("chosen", "set of experts")):
        shares = [getattr(moved, name) for moved in end.values()]
        axes[2].plot(list(end), shares, marker="o", markersize=3, label=label)
    axes[2].set(xlabel="step", ylabel="share of tokens that change from here to the end")
    if end:
        axes[2].legend(fontsize=8)
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    return save(plot, figure, path)
