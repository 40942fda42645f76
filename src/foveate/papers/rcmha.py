"""RCMHA: does a short convolution on queries, keys and values add to relative attention?

The paper has the best next-character accuracy for RCMHA (0.572), above MHA, MDHA (the convolution
alone) and RMHA (relative scores alone). Here small language models on bytes: 2 layers of width 96
with 4 heads, windows of 64 bytes, as an earlier run had them (there on tiny Shakespeare, here
on the standard library's source, which is at hand everywhere). MHA and MDHA have learned absolute
positions. Each arm takes the best of the same four learning rates. "early" is the validation loss
after a fifth of the steps: the paper's convolution should learn faster too. What that run
found of RCMHA over RMHA is half a point of accuracy, so five seeds are judged.

Beside it a task in which the convolution must help: associative recall by a single layer. The value
that follows a key is found by looking for a token whose predecessor is the key, so that a layer
whose keys hold their token alone can't do it (it takes two), and one whose keys are convolved can.

The paper has less memory for RCMHA than for RMHA (2.98 against 3.5 GB of a process). That can't
come from the mechanism, which adds filters and activations: "bytes for backward", counted on the
tensors that autograd keeps in one step, is reported for all arms, and no check is made of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from foveate.papers.harness import Check, Found, Grid, Paper, Trial, at_least
from foveate.papers.tasks import standard_library
from foveate.papers.tasks.recall import Recall
from foveate.papers.training.language import (
    REQUIRES,
    Sizes,
    language_model,
    learnt,
    trained_on_bytes,
)
from foveate.papers.training.loop import train
from foveate.papers.training.objective import evaluate, next_token
from foveate.papers.training.regime import Regime

SIZES = Sizes(layers=2, dim=96, heads=4, length=64)
REACH = 64
ARMS = {
    "MHA": ("full", "learned"),
    "MDHA": ("rcmha(relative=False, value_bias=False)", "learned"),
    "RMHA": (f"rcmha(kernel=1, reach={REACH}, value_bias=False)", "none"),
    "RCMHA": (f"rcmha(reach={REACH}, value_bias=False)", "none"),
}
RECALLS = {f"{arm}, recall": arm for arm in ("RMHA", "RCMHA")}
STEPS, BATCH = 600, 32
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
RECALL_STEPS, RECALL_LR = 800, 3e-3


def run(trial: Trial) -> Found:
    """Train one arm, on bytes or on recall."""
    if trial.cell in RECALLS:
        arm = RECALLS[trial.cell]
        return {arm: on_recall(trial, arm)}
    attention, position = ARMS[trial.cell]

    def make() -> Any:
        return language_model(
            SIZES, attention=attention, position=position, attention_out_bias=True
        )

    model, found = trained_on_bytes(trial, make, steps=STEPS, length=SIZES.length, batch=BATCH)
    task = standard_library(SIZES.length, held=16 if trial.quick else 512)
    found["accuracy"] = evaluate(model, task, "test", BATCH)["accuracy"]
    found["early"] = found["curve"][0][1]
    found["bytes for backward"] = kept_for_backward(
        model, next(iter(task.held_out("validation", 4)))
    )
    return {trial.cell: found}


def recall() -> Recall:
    """Four pairs in 32 tokens of 64 kinds."""
    return Recall(tokens=64, length=32, pairs=4, noise=False, held=256)


def on_recall(trial: Trial, arm: str) -> dict[str, Any]:
    """Train one layer to recall."""
    task = recall()
    attention, position = ARMS[arm]
    model = language_model(
        Sizes(layers=1, dim=64, heads=4, length=task.length, vocab=task.vocab),
        attention=attention, position=position, attention_out_bias=True,
    ).to(trial.device)  # fmt: skip
    regime = Regime(
        steps=4 if trial.quick else RECALL_STEPS,
        batch=BATCH,
        lr=RECALL_LR,
        weight_decay=0.01,
        every=2 if trial.quick else RECALL_STEPS // 4,
        seed=trial.seed,
    )
    train(model, task, regime, folder=trial.folder, tell=trial.tell)
    return {"recall": evaluate(model, task, "test", BATCH)["accuracy"]}


def kept_for_backward(model: nn.Module, batch: Any) -> float:
    """Bytes of the different tensors that autograd keeps in one step on a batch."""
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        held.append(x)
        return x

    device = next(model.parameters()).device
    for parameter in model.parameters():
        pack(parameter)
    own = dict(kept)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        next_token(model, batch.to(device))
    return float(sum(size for at, size in kept.items() if at not in own))


def _ahead(arm: str, least: float, **more: Any) -> Check:
    return at_least(
        f"accuracy: RCMHA - {arm}",
        lambda at: at["RCMHA"]["accuracy"] - at[arm]["accuracy"],
        least,
        **more,
    )


def _faster(ours: str, other: str) -> Check:
    """Alone it refutes nothing: the claim is of the end."""
    return at_least(
        f"early loss: {other} - {ours}",
        lambda at: at[other]["early"] - at[ours]["early"],
        0.0,
        refuted=-math.inf,
    )


PAPER = Paper(
    key="rcmha",
    claim="A depthwise convolution on q, k and v makes relative attention predict better.",
    metric="next-byte accuracy on the test split",
    cells=(*ARMS, *RECALLS),
    run=run,
    baseline=("MHA", "MDHA", "RMHA"),
    ours=("RCMHA",),
    checks=(
        _ahead("RMHA", 0.003, refuted=0.0),
        _ahead("MHA", 0.0),
        _ahead("MDHA", -0.003, refuted=-math.inf),  # it may tie with the other convolution
        _faster("MDHA", "MHA"),
        _faster("RCMHA", "RMHA"),
        at_least(
            "recall by one layer: RCMHA - RMHA",
            lambda at: at["RCMHA"]["recall"] - at["RMHA"]["recall"], 0.3, refuted=-math.inf,
        ),
    ),
    needs=(learnt("RMHA"),),
    seeds=(0, 1, 2, 3, 4),
    grid=Grid("learning rate", RATES, cells=tuple(ARMS), share=0.4),
    requires=REQUIRES,
    data=lambda: f"{standard_library(SIZES.length).describe()}; {recall().describe()}",
)  # fmt: skip
