"""EchoAtt: layers with like maps share one, and a little distillation repairs the model.

A byte-level language model, 8 layers of width 96 with 4 heads, windows of 128, 1,200 steps. Its
layers' similarity on training text chooses 3 of 8 followers (the largest gap of the mean
similarities, then the layers most like their leaders). From its weights, with 400 steps at one
learning rate for all (1e-3; the paper's 1e-4 is for models a thousand times as large) and the same
batches:

- **EchoAtt**: 320 steps of distillation, 80 on the true next bytes;
- **cross entropy**: 400 steps on the true next bytes;
- **untrained**: none;
- **least alike**: as EchoAtt, with the three admissible layers least like their leaders (where
  both choices are the same layers, nothing is said);
- **continued**: the teacher itself, 400 steps on the true next bytes.

Nothing is tuned. The teacher is still learning after 1,200 steps, so that every arm which trains on
may end below it; "cross entropy" and "continued" say how much of that is training.

Counted: weights and numbers cached for each token.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from foveate.methods.echoatt.choice import most_alike, scores, unchanged
from foveate.methods.echoatt.counts import Saved, cache_share
from foveate.methods.echoatt.fit import Profiler
from foveate.models.echo import Stages, adjust, echo_student
from foveate.papers.harness import Found, Paper, Trial, at_least, at_most, difference
from foveate.papers.tasks import ByteText, standard_library
from foveate.papers.training import evaluate
from foveate.papers.training.language import (
    REQUIRES,
    Sizes,
    language_model,
    learnt,
    trained_on_bytes,
)

STEPS, FIRST, SECOND, LR, FOLLOWERS = 1200, 320, 80, 1e-3, 3
SIZES = Sizes(8, 96, 4, 128)
OURS, PLAIN, NONE, LEAST, ON = "EchoAtt", "cross entropy", "untrained", "least alike", "continued"
TEACHER = "teacher"


def run(trial: Trial) -> Found:
    """Train the teacher, look at its layers, and train all students from its weights."""
    teacher, found = trained_on_bytes(
        trial, lambda: language_model(SIZES), steps=STEPS, lr=2e-3, length=SIZES.length
    )
    task = standard_library(SIZES.length, held=16 if trial.quick else 512)
    sim = layers_alike(teacher, task, trial, 16 if trial.quick else 128)
    alike, least = choices(sim)
    parts = (2, 1) if trial.quick else (FIRST, SECOND)
    arms: dict[str, tuple[tuple[int, ...], tuple[int, int]]] = {
        OURS: (alike, parts),
        PLAIN: (alike, (0, sum(parts))),
        NONE: (alike, (0, 0)),
        LEAST: (least, parts),
        ON: ((), (0, sum(parts))),
    }
    figures: dict[str, dict[str, Any]] = {TEACHER: found | layers_facts(sim, alike, least)}
    for number, (name, (followers, (first, second))) in enumerate(arms.items()):
        student = echo_student(teacher, followers)
        if first + second:
            adjust(
                student,
                teacher,
                lambda n: task.batch(trial.seed, 100_000 + n, 16).inputs,
                Stages(first, second, LR),
                progress=lambda share, doing, n=number, who=name: trial.tell(  # type: ignore[misc]
                    (n + share) / len(arms), f"{who}: {doing}"
                ),
            )
        figures[name] = {
            "loss": evaluate(student, task, "test")["loss"],
            "parameters": float(sum(p.numel() for p in student.parameters())),
            "cache": student.new_cache().elements_per_token / SIZES.layers,
        }
    return figures


@torch.no_grad()
def layers_alike(teacher: Any, task: ByteText, trial: Trial, samples: int) -> Tensor:
    """Sim of the teacher's layers on training text, (L, L)."""
    looked, profiler = deepcopy(teacher).eval(), Profiler()
    for block in looked.model.blocks:
        block.attention.attention = profiler
    total, count = torch.zeros(SIZES.layers, SIZES.layers, dtype=torch.float64), 0
    while count < samples:
        looked(task.batch(trial.seed, 200_000 + count, 16).inputs.to(trial.device), use_cache=False)
        found = profiler.similarity()
        total, count = total + found.total, count + found.samples
    return total / count


def choices(sim: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The admissible layers most, and least, like their leaders."""
    kept = unchanged(scores(sim))
    if len([n for n in range(1, len(sim)) if n not in kept]) < FOLLOWERS + 1:
        kept = (0,)  # the gap leaves no choice
    return most_alike(sim, FOLLOWERS, kept), most_alike(sim, FOLLOWERS, kept, least=True)


def layers_facts(sim: Tensor, alike: tuple[int, ...], least: tuple[int, ...]) -> dict[str, Any]:
    """What the choice was made by, for the record, and in how many layers the other one differs."""
    return {
        "neighbours": float(sim.diagonal(1).mean()),
        "chosen otherwise": float(len(set(alike) - set(least))),
        **{f"follower {i}": float(n) for i, n in enumerate(alike)},
    }


def _lost(at: Found) -> float:
    """Weights lost, over those that the formula says."""
    saved = Saved(SIZES.dim, SIZES.heads, SIZES.heads, SIZES.dim // SIZES.heads)
    lost = at[TEACHER]["parameters"] - at[OURS]["parameters"]
    return float(abs(lost - FOLLOWERS * saved.parameters))


def _cache(at: Found) -> float:
    left = at[OURS]["cache"] / at[TEACHER]["cache"]
    return abs(left - float(cache_share(FOLLOWERS, SIZES.layers)))


PAPER = Paper(
    key="echoatt",
    claim="Layers with like attention maps, a third of all, can share one: a little distillation "
    "keeps the quality of the model that they came from, with fewer weights and a smaller cache.",
    metric="test loss in nats for each byte; weights; numbers cached for each token and layer",
    cells=("students",),
    run=run,
    baseline=(TEACHER, PLAIN, NONE, LEAST, ON),
    ours=(OURS,),
    checks=(
        difference(OURS, TEACHER, 0.03, refuted=0.1),
        difference(OURS, PLAIN, 0.005, refuted=math.inf),
        difference(OURS, LEAST, 0.0),
        at_least(
            "loss: untrained - teacher", lambda at: at[NONE]["loss"] - at[TEACHER]["loss"], 0.05,
            refuted=-math.inf,
        ),
        at_most("weights lost - 3 D (h d + h_kv d)", _lost, 0.0, exact=True),
        at_most("cache left - (1 - 3 / 16)", _cache, 1e-9, exact=True),
    ),
    needs=(
        learnt(TEACHER),
        at_least(
            "seeds with a follower that the least alike don't share",
            lambda at: min(1.0, at[TEACHER]["chosen otherwise"]), 1.0,
        ),
    ),
    requires=REQUIRES,
    data=lambda: standard_library().describe(),
    remark="At this size training on the true next bytes repairs the student better than "
    "distillation does, and the least alike layers do as well as the most alike ones: neither "
    "idea is seen to help.",
)  # fmt: skip
