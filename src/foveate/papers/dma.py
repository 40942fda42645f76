"""Dynamic mask attention: sixteen keys chosen by a learnt importance, against the last sixteen.

Associative recall among filler: small language models, 3 layers of width 64 with 2 heads, on
sequences of 64 tokens whose four pairs stand far before the questions. Every query of the sparse
arms sees 16 keys: those of the largest importance, or the last ones (which is what dynamic masks
begin with). Learning rate, data and their order are the same for all arms; the importance is of log
form.

The importance of a key is made from its value alone, so it can tell pairs from filler only where
their tokens differ: with blended tokens, the control, much of what dynamic masks recall must go.
Not all of it: sixteen keys of any kind that isn't the last reach some of the pairs, and a window
reaches none. (The threshold of the control was set after a trial on seed 0, which is not judged.)

"tiles" counts, without training, for keys of random importance: the tiles of 64 x 64 that a kernel
visits which skips whole ones, with and without block smoothing, and the numbers that a step of
decoding reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from foveate.methods.dma import KeptKeys
from foveate.methods.dma.layout import active_tiles, kept
from foveate.papers.harness import Check, Found, Paper, Trial, at_least, at_most
from foveate.papers.tasks import FillerRecall
from foveate.papers.training import Regime, evaluate, train
from foveate.papers.training.language import REQUIRES, Sizes, language_model

WINDOW = 16
STEPS = 1500
ATTENTION = {
    "dense": "full",
    "window": f"sink-window(sinks=0, window={WINDOW})",
    "DMA": f"dma(window={WINDOW}, form='log')",
}
BLENDED = {f"{arm}, blended": ATTENTION[arm] for arm in ("dense", "DMA")}
ARMS = ATTENTION | BLENDED
LENGTH, KEPT, BLOCK = 8192, 1024, 64


def task(arm: str, held: int = 512) -> FillerRecall:
    """What an arm is trained on."""
    return FillerRecall(blended=arm in BLENDED, held=held)


def run(trial: Trial) -> Found:
    """Train one arm, or count tiles."""
    if trial.cell == "tiles":
        return counted(trial)
    given = task(trial.cell, 32 if trial.quick else 512)
    sizes = Sizes(layers=3, dim=64, heads=2, length=given.length, vocab=given.vocab)
    model = language_model(sizes, attention=ARMS[trial.cell]).to(trial.device)
    steps = 4 if trial.quick else STEPS
    regime = Regime(steps=steps, batch=32, lr=3e-3, every=max(2, steps // 10), seed=trial.seed)
    done = train(model, given, regime, folder=trial.folder, tell=trial.tell)
    found = evaluate(model, given, "test", 64)
    return {trial.cell: {"accuracy": found["accuracy"], "loss": found["loss"], "curve": done.curve}}


@torch.no_grad()
def counted(trial: Trial) -> Found:
    """Shares of tiles, and bytes of keys and values that a step of decoding reads."""
    length, window = (512, 64) if trial.quick else (LENGTH, KEPT)
    rank = torch.randn(1, 1, length, generator=torch.Generator().manual_seed(0))
    shares = [
        active / every
        for active, every in (
            active_tiles(kept(rank, window, None, smooth, 0), length) for smooth in (0, BLOCK)
        )
    ]
    state = KeptKeys(1, 64, 64, window)
    x = torch.zeros(1, 1, length, 64)
    state.append(x, x, rank)
    state.cut()
    read = sum(state.held[name].numel() for name in ("k", "v", "rank"))
    return {
        "tiles": {
            "active": shares[0],
            "active, smoothed": shares[1],
            "read": read / (2 * length * 64),
            "kept": window / length,
        }
    }


def lead(other: str) -> Callable[[Found], float]:
    """How much more often DMA recalls than another arm."""
    return lambda at: at["DMA"]["accuracy"] - at[other]["accuracy"]


def learnt(arm: str) -> Check:
    """That a baseline learnt the task, without which the others say nothing."""
    return at_least(f"recall: {arm}", lambda at: at[arm]["accuracy"], 0.9)


PAPER = Paper(
    key="dma",
    claim="Keys chosen by a learnt importance recall what a window of as many keys can't.",
    metric="accuracy of recall on the test split",
    cells=(*ARMS, "tiles"),
    run=run,
    baseline=("dense", "window", "dense, blended"),
    ours=("DMA", "DMA, blended"),
    checks=(
        at_least("recall: DMA - window", lead("window"), 0.30, refuted=0.05),
        at_least(
            "recall: DMA - DMA with blended tokens", lead("DMA, blended"), 0.20, refuted=-math.inf
        ),
        at_most(
            "read in a step of decoding, over the share of keys that is kept",
            lambda at: at["tiles"]["read"] / at["tiles"]["kept"],
            1.01,
            exact=True,
        ),
    ),
    needs=(learnt("dense"), learnt("dense, blended")),
    seeds=(1, 2, 3),
    requires=REQUIRES,
    data=lambda: f"{task('DMA').describe()}; {task('DMA, blended').describe()}",
)
