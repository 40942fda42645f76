"""Flow-Attention: competition and allocation, from the conservation of flows, sharpen a linear one.

Two tasks, each with the same features (sigmoid) throughout, so that linear attention is Flow
without competition and without allocation:

- small language models on bytes, 4 layers of width 64 with 4 heads and learned positions, in
  windows of 64: softmax, Flow, linear, and the two ablations;
- sequences of 1,024 tokens whose class is the marker that comes first, in an encoder of 2 layers
  of width 32 that answers at its first token; positions begin as sinusoids and are learnt. Training
  begins with 64 and 256 tokens: on 1,024 alone, read by their mean, neither arm left chance in 600
  steps, nor did either on 256 alone, read at the first. The learning rate is tuned for both arms.

The claim is refuted if Flow gains on linear attention in neither of them: 0.02 nats, or one point
of accuracy. It holds if it gains on bytes; an earlier run couldn't separate them there in 400
steps, so a loss there refutes nothing by itself. Beside it: whether the ablations lie between,
whether rows of weights are less spread out ("entropy" of the renormalised rows, in nats, on the
test split), and whether the time of forward and backward is linear in the length.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods import make
from foveate.methods.flowformer import Flowformer
from foveate.ops import AttentionOutput, causal
from foveate.papers.harness import Check, Found, Grid, Paper, Trial, at_least, at_most, either
from foveate.papers.tasks import standard_library
from foveate.papers.tasks.markers import FirstMarker
from foveate.papers.training.classify import encoder_classifier
from foveate.papers.training.language import (
    REQUIRES,
    Sizes,
    language_model,
    learnt,
    trained_on_bytes,
)
from foveate.papers.training.loop import train
from foveate.papers.training.objective import evaluate
from foveate.papers.training.regime import Regime
from foveate.parts import Attention, Context

ARMS = {
    "softmax": "full",
    "linear": "flowformer(competition=False, allocation=False)",
    "Flow": "flowformer",
    "no competition": "flowformer(competition=False)",
    "no allocation": "flowformer(allocation=False)",
}
LINEAR_FIRST, FLOW_FIRST = "linear, markers", "Flow, markers"
MARKERS = {LINEAR_FIRST: "linear", FLOW_FIRST: "Flow"}
SPEED = "speed"
STEPS, LR = 1200, 3e-3
MARKER_STEPS, MARKER_DIM = 1000, 32
SHORTER = ((64, 400), (256, 200))  # tokens, and steps of so many
LENGTHS = (1024, 2048, 4096, 8192)


def run(trial: Trial) -> Found:
    """Train one arm on one task, or time Flow-Attention."""
    if trial.cell == SPEED:
        return speed(trial)
    if trial.cell in MARKERS:
        return {trial.cell: on_markers(trial, ARMS[MARKERS[trial.cell]])}
    sizes = Sizes(layers=4, dim=64, heads=4, length=64)

    def make_model() -> Any:
        return language_model(sizes, attention=ARMS[trial.cell], position="learned")

    model, found = trained_on_bytes(trial, make_model, steps=STEPS, lr=LR, length=64)
    found.pop("cache")
    if trial.cell != "softmax":
        found["entropy"] = entropy(model, trial)
    return {trial.cell: found}


def on_markers(trial: Trial, attention: str) -> dict[str, Any]:
    """Train an encoder to tell which marker comes first."""
    task = FirstMarker(shorter=SHORTER)
    if trial.quick:
        task = FirstMarker(128, held=32, shorter=((64, 2),))
    steps = trial.steps(MARKER_STEPS)
    regime = Regime(
        steps=steps,
        lr=trial.tuned,
        weight_decay=0.01,
        every=max(2, steps // 4),
        seed=trial.seed,
    )
    model = encoder_classifier(
        Sizes(2, MARKER_DIM, 4, vocab=task.vocab),
        task.classes,
        attention=attention,
        position="learned",
        pooling="cls",
        max_position_embeddings=task.length,
    )
    encoder: Any = model.model.encoder
    encoder.embed_positions.weight.data = sinusoids(task.length, MARKER_DIM)
    model.to(trial.device)
    done = train(model, task, regime, folder=trial.folder, tell=trial.tell)
    found = evaluate(model, task, "test", regime.batch)
    return {"accuracy": found["accuracy"], "validation": done.history[-1]["validation"]}


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim): sines and cosines of wave lengths from 2 pi to 20,000 pi."""
    angle = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, dim, 2) / dim)
    return torch.cat((angle.sin(), angle.cos()), 1)


class _Kept(Attention):
    """An attention that keeps what it was called with."""

    def __init__(self, method: Flowformer) -> None:
        self.method = method

    @override
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        self.q, self.k, self.ctx = q, k, Context() if ctx is None else ctx
        return self.method(q, k, v, ctx)


@torch.no_grad()
def entropy(model: nn.Module, trial: Trial) -> float:
    """Mean entropy in nats of the renormalised rows of diag(1 / I) W diag(c), on the test split."""
    layers = [module for module in model.modules() if hasattr(module, "projection")]
    for layer in layers:
        layer.attention = _Kept(layer.attention)  # type: ignore[assignment, arg-type]
    task = standard_library(64, held=16 if trial.quick else 64)
    found = []
    for batch in task.held_out("test", 16):
        model(batch.inputs.to(trial.device))
        for layer in layers:
            kept: Any = layer.attention
            flows = kept.method.flows(kept.q, kept.k, kept.ctx)
            weights = kept.method.features(kept.q) @ kept.method.features(kept.k).mT
            weights = (weights * flows.competition[:, :, None]).tril()
            rows = weights / weights.sum(-1, keepdim=True)
            found.append(torch.special.entr(rows).sum(-1).mean())
    for layer in layers:
        layer.attention = layer.attention.method  # type: ignore[union-attr]
    return torch.stack(found).mean().item()


def speed(trial: Trial) -> Found:
    """Seconds of forward and backward, 4 heads of 64, and the growth at each doubling."""
    from foveate.runs.timing import Pace, race

    method = make("flowformer")
    lengths = (64, 128, 256, 512) if trial.quick else LENGTHS
    found: dict[str, float] = {}
    for form, ctx in (("normal", Context()), ("causal", Context(mask=causal()))):

        def call(length: int, ctx: Context = ctx) -> Any:
            q, k, v = (
                torch.randn(1, 4, length, 64, device=trial.device, requires_grad=True)
                for _ in range(3)
            )
            return lambda: method(q, k, v, replace(ctx, store={})).out.sum().backward()

        samples = race({str(n): call(n) for n in lengths}, Pace(repeats=2 if trial.quick else 7))
        seconds = {n: median(samples[str(n)].wall) for n in lengths}
        found |= {f"seconds {form} {n}": seconds[n] for n in lengths[-1:]}
        growth = [math.log2(seconds[b] / seconds[a]) for a, b in zip(lengths, lengths[1:])]
        found[f"exponent {form}"] = sum(growth) / len(growth)
        found[f"growth {form}"] = 2 ** max(growth)
    return {"Flow": found}


GAINS = (
    at_least(
        "loss: linear - Flow", lambda at: at["linear"]["loss"] - at["Flow"]["loss"], 0.02,
    ),
    at_least(
        "accuracy on markers: Flow - linear",
        lambda at: at[FLOW_FIRST]["accuracy"] - at[LINEAR_FIRST]["accuracy"], 0.01,
    ),
)  # fmt: skip


def _between(arm: str) -> tuple[Check, Check]:
    """That an ablation isn't better than Flow, nor worse than linear; alone they refute nothing."""
    return (
        at_least(
            f"loss: {arm} - Flow", lambda at: at[arm]["loss"] - at["Flow"]["loss"], 0.0,
            refuted=-math.inf,
        ),
        at_least(
            f"loss: linear - {arm}", lambda at: at["linear"]["loss"] - at[arm]["loss"], 0.0,
            refuted=-math.inf,
        ),
    )  # fmt: skip


def _linear_time(form: str) -> Check:
    return at_most(
        f"seconds, {form}: most at a doubling", lambda at: at["Flow"][f"growth {form}"], 2.3,
        refuted=3.0,
    )  # fmt: skip


PAPER = Paper(
    key="flowformer",
    claim="Competition and allocation make linear attention better, in linear time.",
    metric="test loss in nats for each byte; accuracy on 1,024 tokens",
    cells=(*ARMS, *MARKERS, SPEED),
    run=run,
    baseline=("softmax", "linear", LINEAR_FIRST),
    ours=("Flow", "no competition", "no allocation", FLOW_FIRST),
    checks=(
        either("Flow gains", *GAINS),
        replace(GAINS[0], refuted=-math.inf),
        *_between("no competition"),
        *_between("no allocation"),
        at_most(
            "entropy: Flow - linear", lambda at: at["Flow"]["entropy"] - at["linear"]["entropy"],
            0.0, refuted=math.inf,
        ),
        _linear_time("normal"),
        _linear_time("causal"),
    ),
    needs=(
        learnt("softmax"),
        at_least(
            "accuracy of the better one",
            lambda at: max(at[arm]["accuracy"] for arm in MARKERS), 0.7,
        ),
    ),
    requires=REQUIRES,
    data=lambda: f"{standard_library(64).describe()}; {FirstMarker(shorter=SHORTER).describe()}",
    grid=Grid("learning rate", (1.5e-3, 3e-3, 6e-3, 1.2e-2), cells=tuple(MARKERS)),
    alone=("speed",),
    remark="On bytes Flow loses 0.085 nats against linear attention, at every seed, and it is "
    "competition that costs them: with allocation alone the loss is linear attention's but for "
    "0.009. Rows of weights are more spread out with it, not less. On markers the seeds differ by "
    "as much as the arms, which leaves the claim undecided there.",
)  # fmt: skip
