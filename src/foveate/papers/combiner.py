"""Combiner: a sparse pattern's cost with full attention's reach.

Images of 16 x 16 pixels in 8 grey levels, drawn pixel by pixel: a diagonal gradient, over it
rectangles, each of one level, so that what is far above or far left matters. Small language models
read an image in rows and predict each pixel from those before it, 2 layers of width 64 with 4
heads. Fixed sees its own row and the last pixel of each earlier one; axial its own row and column.
Combiner adds to each of them, in one softmax, summaries of all else: earlier rows (fixed), the
other columns above (vertical). Every arm has the same learning rates to choose from, the same data
in the same order, and the same number of parameters.

Counted beside them, without training: the share of earlier pixels that have a weight in one layer,
and how the work grows from 1,024 to 65,536 tokens with blocks near the square root.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.combiner import Combiner
from foveate.methods.combiner.counts import coverage, items, near_root
from foveate.ops import Layout, Mask, causal, strided, window
from foveate.papers.harness import Check, Found, Grid, Paper, Trial, at_least, at_most
from foveate.papers.tasks.base import Batch, Generated
from foveate.papers.training import Regime, evaluate, train
from foveate.papers.training.language import REQUIRES, Sizes, language_model
from foveate.parts import Context, Pattern
from foveate.parts.attention import mask_layout
from foveate.parts.growth import exponent

SIDE, LEVELS, STEPS = 16, 8, 1000
TABLE = 0.96  # bits of a table of the pixels to the left and above; of the left alone, 1.42
LENGTHS = tuple(1024 << n for n in range(7))
FULL, FIXED, AXIAL = "full", "fixed sparse", "axial sparse"
OURS_FIXED, OURS_AXIAL, LOGSPARSE = "Combiner-fixed", "Combiner-axial", "Combiner-logsparse"
COUNTED = {OURS_FIXED: "fixed", OURS_AXIAL: "vertical", LOGSPARSE: "logsparse"}
ARMS = {
    FULL: "full",
    FIXED: "full",
    AXIAL: "full",
    OURS_FIXED: f"combiner(partition='fixed', size={SIDE})",
    OURS_AXIAL: f"combiner(partition='vertical', size={SIDE})",
}
PATTERNS: dict[str, Mask] = {
    FIXED: window(0, 0, block=SIDE) | strided(SIDE, phase=SIDE - 1),
    AXIAL: window(0, 0, block=SIDE) | strided(SIDE, axis="offset"),
}


@dataclass(frozen=True)
class Images(Generated):
    """Images as rows of pixels, each to be predicted from those before it.

    Level at (r, c): (a r + b c + shift) // 6 modulo the number of levels, a and b from 1 to 3, then
    `rectangles` rectangles, one over the other. Token LEVELS begins an image.

    Attributes:
        side: rows, and columns.
        levels: of grey.
        rectangles: in each image.
        held: images in each of validation and test.
    """

    side: int = SIDE
    levels: int = LEVELS
    rectangles: int = 3
    held: int = 512

    @property
    @override
    def vocab(self) -> int:
        return self.levels + 1

    @override
    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Images of any split: (count, side * side)."""

        def number(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (count, 1, 1), generator=random)

        at = torch.arange(self.side)
        r, c = at[None, :, None], at[None, None, :]
        image = (number(1, 4) * r + number(1, 4) * c + number(0, 6 * self.levels)) // 6
        image = image % self.levels
        for _ in range(self.rectangles):
            top, left = number(0, self.side - 3), number(0, self.side - 3)
            high, wide = number(3, self.side // 2 + 1), number(3, self.side // 2 + 1)
            inside = (r >= top) & (r < top + high) & (c >= left) & (c < left + wide)
            image = torch.where(inside, number(0, self.levels), image)
        pixels = image.flatten(1)
        first = torch.full((count, 1), self.levels)
        return Batch(torch.cat((first, pixels[:, :-1]), 1), pixels)


class Seen(Pattern):
    """A sparse pattern that positions alone decide."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        return mask_layout(self.mask & (ctx.mask or causal()), q, k, ctx)


def model_of(arm: str) -> Any:
    """A small language model of pixels; weights from torch's random state."""
    sizes = Sizes(layers=2, dim=64, heads=4, length=SIDE * SIDE, vocab=LEVELS + 1)
    made = language_model(sizes, attention=ARMS[arm], position="learned")
    if arm in PATTERNS:
        for block in made.model.blocks:
            block.attention.attention = Seen(PATTERNS[arm])
    return made


def run(trial: Trial) -> Found:
    """Count, or train one arm."""
    if trial.cell == "counts":
        return counts()
    task = Images(held=16 if trial.quick else 512)
    steps = trial.steps(STEPS)
    regime = Regime(
        steps=steps, batch=16, lr=trial.tuned, every=max(2, steps // 4), seed=trial.seed,
    )  # fmt: skip
    model = model_of(trial.cell).to(trial.device)
    done = train(model, task, regime, folder=trial.folder, tell=trial.tell)
    bits = evaluate(model, task, "test", regime.batch)["loss"] / math.log(2)
    found: dict[str, Any] = {
        "bits": bits,
        "validation": done.history[-1]["validation"],
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "curve": done.curve,
    }
    return {trial.cell: found}


def counts() -> Found:
    """Coverage of one layer at 256 pixels, and the exponents of the work."""

    def growth(partition: str) -> float:
        work = [items(Combiner(partition, size=near_root(n)), n).total for n in LENGTHS]
        return exponent(LENGTHS, work)

    length = SIDE * SIDE
    allowed = causal().pairs(length, length)
    found: dict[str, dict[str, float]] = {
        arm: {"coverage": (mask & causal()).pairs(length, length) / allowed}
        for arm, mask in PATTERNS.items()
    }
    for arm, partition in COUNTED.items():
        found[arm] = {
            "coverage": coverage(Combiner(partition, size=SIDE), length),
            "exponent": growth(partition),
        }
    found[FULL] = {"exponent": exponent(LENGTHS, [n * (n + 1) // 2 for n in LENGTHS])}
    return found


def _better(ours: str, base: str) -> tuple[Check, Check]:
    """Fewer bits than the sparse base, and a quarter of its gap to full attention closed.

    Where full attention is no better than the base, nothing is to close: fewer bits are all.
    """
    return (
        at_most(
            f"bits: {ours} - {base}", lambda at: at[ours]["bits"] - at[base]["bits"], 0.0,
            refuted=0.02,
        ),
        at_most(
            f"bits: {ours} - {base} + 0.25 max({base} - {FULL}, 0)",
            lambda at: at[ours]["bits"] - at[base]["bits"]
            + 0.25 * max(at[base]["bits"] - at[FULL]["bits"], 0.0),
            0.0, refuted=math.inf,
        ),
    )  # fmt: skip


def _grows(arm: str, most: float) -> Check:
    return at_most(f"exponent of work: {arm}", lambda at: at[arm]["exponent"], most, exact=True)


def _covers(arm: str) -> Check:
    return at_most(f"1 - coverage: {arm}", lambda at: 1 - at[arm]["coverage"], 0.0, exact=True)


PAPER = Paper(
    key="combiner",
    claim="Summaries of spans give a sparse pattern the reach of full attention at its own cost, "
    "and models with them predict images better than with the pattern alone.",
    metric="test bits for each pixel",
    cells=("counts", *ARMS),
    run=run,
    baseline=(FULL, FIXED, AXIAL),
    ours=(OURS_FIXED, OURS_AXIAL),
    checks=(
        *_better(OURS_FIXED, FIXED),
        *_better(OURS_AXIAL, AXIAL),
        _grows(OURS_FIXED, 1.55),
        _grows(OURS_AXIAL, 1.55),
        _grows(LOGSPARSE, 1.15),
        *(_covers(arm) for arm in COUNTED),
    ),
    needs=(
        at_most(f"bits: {FULL}", lambda at: at[FULL]["bits"], TABLE),
        at_least(
            f"bits: {FIXED} - {FULL}", lambda at: at[FIXED]["bits"] - at[FULL]["bits"], 0.02
        ),
    ),
    requires=REQUIRES,
    data=lambda: Images().describe(),
    grid=Grid("learning rate", (4e-3, 8e-3, 1.6e-2, 3.2e-2), cells=tuple(ARMS)),
    remark="Summaries of the columns above help: with them a row and a column predict images "
    "better than dense attention at the highest rate that was tried for it. Summaries of earlier "
    "rows gain nothing that shows on the last pixel of each: three seeds differ by a twentieth of "
    "a bit.",
)  # fmt: skip
