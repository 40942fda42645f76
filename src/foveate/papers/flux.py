"""Flux: a router per layer keeps full attention for prompts that look back, and no other.

A model of 3 layers (width 64, 2 heads, 64 tokens) learns two kinds of sequences at once, dense:
recalling values from the first 41 tokens (`FarRecall`), and a Markov text (`NearText`), in 4,000
steps (after 2,500 one seed of three recalled half of the values). Then it is frozen, and routers
are trained for 250 steps to mix full attention with 2 sinks and the last 8 tokens, pulled to a
sparsity of 0.45 on the first kind and 1 on the second. Told on test sequences, each decided once,
without noise: accuracy of the recalled values, cross entropy of the text, and the share of full
attention on each. Beside it all layers sparse, and full attention in one layer, the same for both
kinds. The decision pools a sequence's last 8 tokens, among which the values that are asked for
stand, in training and in the test alike. "keys read" is the share of the cache that a decoded token
reads.

Losses are means over sequences of their means, so that four recalled values count as much as 64
tokens of text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.methods import make
from foveate.methods.flux import Flux, Routers
from foveate.methods.flux.train import (
    Mixing,
    Multipliers,
    learning_rate,
    optimizer_of,
    temperature,
)
from foveate.papers.harness import Check, Found, Paper, Trial, at_least, at_most, difference
from foveate.papers.tasks.base import IGNORED, Batch
from foveate.papers.tasks.routed import Mixed
from foveate.papers.training.language import REQUIRES, Sizes, language_model
from foveate.papers.training.loop import train
from foveate.papers.training.objective import logits_of
from foveate.papers.training.regime import Regime

LAYERS, WIDTH, HEADS = 3, 64, 2
DENSE, SPARSE, ROUTED = "dense", "sparse", "routed"
FIXED = "full in layer {}"
SPEC: dict[str, Any] = {"sinks": 2, "local": 8, "block": 1, "pool": 8}
CLASSES = ("retrieval", "prose")  # of `foveate.methods.flux.train.TARGETS`


def run(trial: Trial) -> Found:
    """Train the model, then its routers; take all arms' figures."""
    torch.manual_seed(trial.seed)
    task = Mixed()
    sizes = Sizes(LAYERS, WIDTH, HEADS, task.far.length, task.vocab)
    model = language_model(sizes).to(trial.device)
    steps = 4 if trial.quick else 4000
    regime = Regime(
        steps=steps, batch=32, lr=3e-3, weight_decay=0.01, every=max(1, steps // 5),
        seed=trial.seed,
    )  # fmt: skip

    def tell(share: float, doing: str) -> None:
        trial.tell(0.8 * share, doing)

    train(model, task, regime, objective=by_sequence, folder=trial.folder, tell=tell)
    model.requires_grad_(False)
    method = Flux(**SPEC)
    routers = Routers(tuple(range(LAYERS)), WIDTH // HEADS).to(trial.device)
    rise = fit(trial, model, method, routers, task)
    mixing = Mixing(method, routers, ())
    found: dict[str, dict[str, float]] = {DENSE: measured(model, task, {})}
    sparse = Flux(**SPEC, route="sparse")
    found[SPARSE] = measured(model, task, dict.fromkeys(range(LAYERS), sparse))
    for layer in range(LAYERS):
        others = {i: sparse for i in range(LAYERS) if i != layer}
        found[FIXED.format(layer)] = measured(model, task, others)
    every = dict.fromkeys(range(LAYERS), mixing)
    found[ROUTED] = measured(model, task, every, mixing) | {"lambda rise": rise}
    return found


# -- losses ---------------------------------------------------------------------------------------
def entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """(B,) mean cross entropy of each sequence's scored tokens."""
    each = nn.functional.cross_entropy(
        logits.float().mT, targets, ignore_index=IGNORED, reduction="none"
    )
    scored = targets != IGNORED
    return each.masked_fill(~scored, 0.0).sum(1) / scored.sum(1)


def by_sequence(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over sequences of their means."""
    return entropies(logits_of(model(batch.inputs)), batch.targets).mean()


# -- routers --------------------------------------------------------------------------------------
def put(model: Any, attentions: dict[int, Any]) -> None:
    """Let layers run these attentions, and all others full attention."""
    for i, layer in enumerate(model.model.layers):
        layer.attention.attention = attentions.get(i, make("full"))


def fit(trial: Trial, model: Any, method: Flux, routers: Routers, task: Mixed) -> float:
    """Train the routers on the frozen model; by how much lambda_1 of recall rose."""
    steps, size = (4, 8) if trial.quick else (250, 32)
    multipliers = Multipliers(torch.Generator().manual_seed(trial.seed)).to(trial.device)
    optimizer = optimizer_of(routers, multipliers, 1e-3, 1e-2)
    rates = [group["lr"] for group in optimizer.param_groups]
    began = float(multipliers.values[0, 0].detach())
    length = task.far.length
    kinds = (CLASSES[0],) * (size - size // 4) + (CLASSES[1],) * (size // 4)
    for step in range(steps):
        batch = task.batch(trial.seed + 500, step, size).to(trial.device)
        random = torch.Generator().manual_seed(trial.seed * steps + step)
        mixing = Mixing(method, routers, (length,) * size, temperature(step, steps), random)
        put(model, dict.fromkeys(range(LAYERS), mixing))
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * learning_rate(step, steps)
        loss = by_sequence(model, batch)
        optimizer.zero_grad()
        (loss + multipliers.constraint(mixing.sparsity, kinds)).backward()
        nn.utils.clip_grad_norm_(routers.parameters(), 5.0)
        optimizer.step()
        if step % 10 == 0:
            trial.tell(0.8 + 0.2 * step / steps, "routers")
    put(model, {})
    return float(multipliers.values[0, 0].detach()) - began


# -- figures --------------------------------------------------------------------------------------
@torch.no_grad()
def measured(
    model: Any, task: Mixed, attentions: dict[int, Any], mixing: Mixing | None = None
) -> dict[str, float]:
    """Accuracy of recall, loss of text, share of full attention on both, keys read."""
    model.eval()
    put(model, attentions)
    figures: dict[str, float] = {}
    full = float(LAYERS - len(attentions)) / LAYERS
    for kind, source in (("recall", task.far), ("text", task.near)):
        right = scored = count = 0
        entropy = shares = 0.0
        for batch in source.held_out("test", 64):
            batch = batch.to(next(model.parameters()).device)
            if mixing is not None:
                mixing.prompt = (batch.inputs.shape[1],) * len(batch.inputs)
            logits = logits_of(model(batch.inputs))
            asked = batch.targets != IGNORED
            right += int((logits.argmax(-1) == batch.targets)[asked].sum())
            scored += int(asked.sum())
            entropy += float(entropies(logits, batch.targets).sum())
            count += len(batch.inputs)
            if mixing is not None:
                shares += float((1 - mixing.sparsity).sum())
        figures[f"accuracy of {kind}"] = right / scored
        figures[f"loss of {kind}"] = entropy / count
        figures[f"full on {kind}"] = full if mixing is None else shares / count
        share, seen = figures[f"full on {kind}"], SPEC["sinks"] + SPEC["local"]
        figures[f"keys read on {kind}"] = share + (1 - share) * seen / source.length
    put(model, {})
    return figures


def _figure(arm: str, metric: str) -> Callable[[Found], float]:
    return lambda at: at[arm][metric]


def _apart() -> Check:
    return at_least(
        "full attention: recall - text",
        lambda at: at[ROUTED]["full on recall"] - at[ROUTED]["full on text"],
        0.3,
        refuted=0.1,
    )


PAPER = Paper(
    key="flux",
    claim="Routers keep full attention for prompts that need it and go sparse on the others, at no "
    "loss of quality.",
    metric="accuracy of recall, cross entropy of text in nats, share of full attention",
    cells=("model",),
    run=run,
    baseline=(DENSE, SPARSE, *(FIXED.format(i) for i in range(LAYERS))),
    ours=(ROUTED,),
    checks=(
        _apart(),
        difference(DENSE, ROUTED, 0.03, metric="accuracy of recall", refuted=0.1),
        at_least(
            "accuracy of recall: routed - sparse",
            lambda at: at[ROUTED]["accuracy of recall"] - at[SPARSE]["accuracy of recall"],
            0.3,
        ),
        at_most(
            "loss of text: routed / dense",
            lambda at: at[ROUTED]["loss of text"] / at[DENSE]["loss of text"],
            1.01,
            refuted=1.05,
        ),
    ),
    needs=(
        at_least("accuracy of recall: dense", _figure(DENSE, "accuracy of recall"), 0.95),
        at_most("accuracy of recall: sparse", _figure(SPARSE, "accuracy of recall"), 0.5),
    ),
    data=lambda: Mixed().describe(),
    requires=REQUIRES,
)
