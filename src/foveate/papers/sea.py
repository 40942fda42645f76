"""SEA: a model with dense attention, distilled to a linear one that keeps a few keys a query.

For each seed a small teacher (2 layers of width 64 with 4 heads, dense) is trained on bytes, and
another one on recall: pairs of key and value at the beginning, keys asked for later. Students start
from the teacher's weights and are distilled from it for a few hundred steps: SEA (K = 24, k = 6), a
Performer (44 relu features) and a sliding window of 6 keys, the latter two by their contexts in
place of SEA's layer losses. So small a teacher of text is local, so that a window of 6 does well
there; recall tells SEA from it.

Counted beside them: how SEA's work grows from 1,024 to 65,536 tokens, and its masks from 1,024 to
8,192 under a smooth random estimate. "mass" is the part of the teacher's attention that SEA's masks
hold on the test split, "keys" how many keys they keep for each query and head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from foveate.methods.sea import SEA, performer
from foveate.methods.sea.compress import budgets, keep_best
from foveate.methods.sea.counts import flops
from foveate.methods.sea.layout import Stretch, layout_of
from foveate.ops import AttentionOutput
from foveate.papers.harness import Found, Paper, Trial, at_least, at_most
from foveate.papers.tasks import standard_library
from foveate.papers.tasks.base import Task
from foveate.papers.tasks.recall import Recall
from foveate.papers.training import Regime, evaluate, train
from foveate.papers.training.language import REQUIRES, Sizes, language_model
from foveate.parts import Attention, Context, Heads
from foveate.parts.growth import exponent

DENSE, OURS, WINDOW, PERFORMER = "dense", "SEA", "window", "Performer"
TEXT, RECALL = "text", "recall"
LENGTH, KEYS = 96, 6
STUDENTS = {
    OURS: f"sea(k={KEYS}, width=24, divisor=1.0, max_length=128)",
    WINDOW: f"sink-window(sinks=0, window={KEYS})",
    PERFORMER: "full",
}
TEACHER_STEPS = {TEXT: 700, RECALL: 2000}
STUDENT_STEPS = {TEXT: 200, RECALL: 500}
LENGTHS = tuple(1024 << n for n in range(7))


class Performer(Attention, nn.Module):
    """Causal linear attention over relu features, in place of exact attention.

    Args:
        dim: D of the heads.
    """

    w: Tensor

    def __init__(self, dim: int) -> None:
        nn.Module.__init__(self)
        self.register_buffer("w", performer.draw(performer.feature_count(dim, 1.0), dim))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Attend, as many key heads as query heads."""
        out, _ = performer.causal(
            performer.relu_features(q, self.w), performer.relu_features(k, self.w), v
        )
        return AttentionOutput(out, out.new_full(out.shape[:3], torch.nan))


def task_of(cell: str, quick: bool) -> Task:
    """The data of a cell."""
    held = 16 if quick else 512
    if cell == TEXT:
        return standard_library(LENGTH, held=held)
    return Recall(tokens=128, length=LENGTH, pairs=8, power=1.0, held=held)


def run(trial: Trial) -> Found:
    """Count; or train one teacher and distil its students."""
    if trial.cell == "counts":
        return counts()
    task = task_of(trial.cell, trial.quick)
    sizes = Sizes(layers=2, dim=64, heads=4, length=LENGTH, vocab=task.vocab)
    teacher = language_model(sizes).to(trial.device)
    steps = 4 if trial.quick else TEACHER_STEPS[trial.cell]
    regime = Regime(steps=steps, batch=32, lr=3e-3, every=max(1, steps // 4), seed=trial.seed)
    done = train(
        teacher, task, regime, folder=trial.folder,
        tell=lambda share, what: trial.tell(0.5 * share, f"teacher, {what}"),
    )  # fmt: skip
    figures = _figures(teacher, task, trial.cell)
    found: dict[str, dict[str, Any]] = {DENSE: figures | {f"{trial.cell} curve": done.curve}}
    for number, arm in enumerate(STUDENTS):
        student = distilled(arm, teacher, task, trial, 0.5 + number / 6)
        found[arm] = _figures(student, task, trial.cell)
        if arm == OURS:
            found[arm] |= {f"{trial.cell} {n}": x for n, x in masks(student, teacher, task).items()}
    return found


def _figures(model: Any, task: Task, cell: str) -> dict[str, Any]:
    found = evaluate(model, task, "test", 32)
    return {f"{cell} loss": found["loss"], f"{cell} accuracy": found["accuracy"]}


def distilled(arm: str, teacher: Any, task: Task, trial: Trial, begins: float) -> Any:
    """One student, trained."""
    from foveate.models.distil import distil, student_of

    torch.manual_seed(trial.seed + 1)
    student = student_of(teacher, STUDENTS[arm])
    for name, module in student.named_modules():
        new = ".attention.attention." in name
        if new and isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()  # as torch makes them, like all other maps here
    if arm == PERFORMER:
        for block in student.model.blocks:
            block.attention.attention = Performer(sizes_of(block.attention))
    steps = 4 if trial.quick else STUDENT_STEPS[trial.cell]

    def batch(number: int) -> tuple[Tensor, Tensor]:
        drawn = task.batch(trial.seed, 100_000 + number, 16).to(trial.device)
        return drawn.inputs, drawn.targets

    def tell(number: int, parts: dict[str, float]) -> None:
        if number % 10 == 0:
            trial.tell(begins + number / steps / 6, f"{arm}, step {number}")

    distil(student, teacher, batch, steps=steps, tell=tell)
    return student


def sizes_of(layer: Any) -> int:
    """Width of a layer's heads."""
    return int(layer.dim // layer.projection.heads)


@torch.no_grad()
def masks(student: Any, teacher: Any, task: Task) -> dict[str, float]:
    """How much of the teacher's attention SEA's masks hold, and how many keys they keep."""
    from foveate.models.distil import heard

    batch = next(iter(task.held_out("test", 16)))
    methods = [block.attention.attention for block in student.model.blocks]
    for method in methods:
        method.trace = []
    student(batch.inputs)
    layouts = [method.trace.pop().layout for method in methods]
    for method in methods:
        method.trace = None
    with heard(teacher) as said:
        teacher(batch.inputs)
    mass, keys = [], []
    for layout, layer in zip(layouts, said):
        scores = layer.q @ layer.k.mT * layer.scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        p = scores.masked_fill(hidden, -math.inf).softmax(-1)
        mass.append((p * layout.dense()).sum(-1).mean().item())
        keys.append(layout.pairs / scores.shape[-2])
    return {"mass": sum(mass) / len(mass), "keys": sum(keys) / len(keys)}


def counts() -> Found:
    """Exponents of SEA's work and of its masks."""
    heads = Heads(768, 12, 12, 64, 64)
    work = [flops(SEA(), heads, n).total for n in LENGTHS]
    lengths, areas = LENGTHS[:4], []
    for n in lengths:
        drawn = torch.randn(1, 4, n // 32 + 2, 256, generator=torch.Generator().manual_seed(n))
        smooth = nn.functional.interpolate(drawn, (n, 256), mode="bilinear").softmax(-1)
        seen = torch.arange(1, n + 1)[None]
        keep = keep_best(smooth, budgets(16, seen, 256, 4, "causal_batch", n), "causal_batch")
        areas.append(layout_of(keep, Stretch(seen, torch.zeros(1).long(), n)).tile_area)
    return {OURS: {"work": exponent(LENGTHS, work), "mask": exponent(lengths, areas)}}


def _gap(metric: str, arm: str, sign: float) -> Any:
    return lambda at: sign * (at[arm][metric] - at[DENSE][metric])


def _share(metric: str, sign: float) -> Any:
    """SEA's gap less a fifth of the Performer's."""
    ours, theirs = _gap(metric, OURS, sign), _gap(metric, PERFORMER, sign)
    return lambda at: ours(at) - 0.2 * theirs(at)


PAPER = Paper(
    key="sea",
    claim="Distilled from a dense model, a linear estimate of where attention goes keeps its "
    "quality with a few keys for each query, where other linear attentions don't.",
    metric="test loss in nats for each byte; accuracy of recall",
    cells=("counts", TEXT, RECALL),
    run=run,
    baseline=(DENSE, WINDOW, PERFORMER),
    ours=(OURS,),
    checks=(
        at_most(
            "text loss: SEA's gap to dense - 0.2 of the Performer's", _share("text loss", 1.0), 0.0,
            refuted=math.inf,
        ),
        at_most(
            "text loss: SEA - Performer",
            lambda at: at[OURS]["text loss"] - at[PERFORMER]["text loss"], 0.0,
        ),
        at_most(
            "recall accuracy: SEA's gap to dense - 0.2 of the Performer's",
            _share("recall accuracy", -1.0), 0.0, refuted=math.inf,
        ),
        at_least(
            "recall accuracy: SEA - window",
            lambda at: at[OURS]["recall accuracy"] - at[WINDOW]["recall accuracy"], 0.1,
            refuted=0.0,
        ),
        at_most("exponent of work: SEA", lambda at: at[OURS]["work"], 1.05, exact=True),
        at_most("exponent of masks: SEA", lambda at: at[OURS]["mask"], 1.1, exact=True),
    ),
    needs=(
        at_most("text loss: dense", lambda at: at[DENSE]["text loss"], 2.2),
        at_least("recall accuracy: dense", lambda at: at[DENSE]["recall accuracy"], 0.9),
    ),
    requires=REQUIRES,
    data=lambda: f"{task_of(TEXT, False).describe()}; {task_of(RECALL, False).describe()}",
)  # fmt: skip
