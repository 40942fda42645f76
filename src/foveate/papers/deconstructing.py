"""Which of attention's design principles do language models need?

Small language models on bytes: 4 layers of width 64 with 4 heads, windows of 64, 3000 steps at one
learning rate, 3e-3, for all arms alike. Attention gives way to each variant in every layer, or in
layers 1 and 3 ("hybrid"); a hybrid without those layers is its "skip". Approximate attention is
normalised as a whole (`joint_full`), static embeddings go through the layer's norm, the random ones
have deviation 1 (as the token embeddings start), and the fixed sequence is the text's beginning.
The paper's Non-approximate is worse than the MLP in 24 layers; in 4 it isn't expected to be.

Cost: forward and backward of one layer of width 128 with 4 heads, fp32. The two linear-time
variants must grow slower than dense attention does.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import torch

from foveate.methods.deconstructing import composed, standard_layers
from foveate.papers.harness import Check, Found, Paper, Trial, at_least, at_most, difference
from foveate.papers.tasks import standard_library
from foveate.papers.training.growth import growth
from foveate.papers.training.language import (
    REQUIRES,
    Sizes,
    language_model,
    learnt,
    trained_on_bytes,
)
from foveate.papers.training.objective import evaluate

SIZES = Sizes(layers=4, dim=64, heads=4, length=64)
VARIANTS = {
    "MLP": ("mlp", ""),
    "Approximate": ("approximate", ""),
    "Non-approximate": ("non-approximate", ""),
    "RndEmbQK": ("rnd-emb-qk", f"length={SIZES.length}, sigma=1.0"),
    "FixedSeqQK": ("fixed-seq-qk", f"length={SIZES.length}"),
    "StaticEmbQK": ("static-emb-qk", ""),
}
STANDARD = "Standard"
UNIFORM = tuple(VARIANTS)
HYBRID = tuple(f"{name} hybrid" for name in UNIFORM)
SKIP = tuple(f"{name} skip" for name in UNIFORM)
STEPS = 3000
LENGTHS = (256, 512, 1024, 2048, 4096)
COST = {  # and the exponent of their time in theory
    "Standard cost": ("full", 2.0),
    "Approximate cost": ("deconstructed-approximate", 1.0),
    "Non-approximate cost": ("deconstructed-nonapproximate", 1.0),
}


def composition(cell: str) -> dict[str, Any]:
    """The config's fields for an arm."""
    name, _, hybrid = cell.partition(" ")
    variant, options = ("standard", "") if name == STANDARD else VARIANTS[name]
    return composed(variant, SIZES.layers, "even" if hybrid else "uniform", options)


def run(trial: Trial) -> Found:
    """Time the layers, or train one arm; a hybrid is judged without its variant's layers, too."""
    if trial.cell == "cost":
        return cost(trial)

    def make() -> Any:
        model = language_model(SIZES, **composition(trial.cell))
        stream = model.model.reference
        if stream is not None and stream.reference.kind == "tokens":
            model.set_reference(standard_library(SIZES.length).beginning(SIZES.length))
        return model

    model, found = trained_on_bytes(trial, make, steps=STEPS, lr=3e-3, length=SIZES.length)
    if trial.cell not in HYBRID:
        return {trial.cell: found}
    from foveate.models import without_layers

    kept = standard_layers("even", SIZES.layers)
    out = [i for i in range(SIZES.layers) if i + 1 not in kept]
    task = standard_library(SIZES.length, held=16 if trial.quick else 512)
    alone = evaluate(without_layers(model, out), task, "test")["loss"]
    return {trial.cell: found, trial.cell.replace("hybrid", "skip"): {"loss": alone}}


def cost(trial: Trial) -> Found:
    """Seconds of one layer by length, and the exponents."""
    from foveate.nn import Attention

    torch.manual_seed(trial.seed)
    layers = {
        arm: (Attention(128, 4, attention=text), theory) for arm, (text, theory) in COST.items()
    }
    lengths = tuple(n // 16 for n in LENGTHS) if trial.quick else LENGTHS
    return growth(layers, lengths, 128)


def _worst(arm: str) -> Check:
    return at_least(
        f"loss: MLP - {arm}", lambda at: at["MLP"]["loss"] - at[arm]["loss"], 0.15, refuted=0.0
    )


def _hybrids(at: Found) -> float:
    return median(at[arm]["loss"] for arm in HYBRID) - at[STANDARD]["loss"]


PAPER = Paper(
    key="deconstructing",
    claim="Token mixing can't be given up, but most layers may have a mixer that drops the form of "
    "attention, its dependence on the input or on the layer, if other layers are attention.",
    metric="test loss in nats for each byte; exponent of a layer's time in the length",
    cells=("cost", STANDARD, *UNIFORM, *HYBRID),
    run=run,
    baseline=(STANDARD, "MLP", "Standard cost"),
    ours=(
        *UNIFORM[1:],
        *HYBRID,
        *SKIP,
        *(arm for arm in COST if arm != "Standard cost"),
    ),
    checks=(
        at_least(
            "loss: MLP - Standard",
            lambda at: at["MLP"]["loss"] - at[STANDARD]["loss"],
            0.15,
            refuted=0.1,
        ),
        *(_worst(arm) for arm in UNIFORM[1:]),
        *(difference(f"{arm} hybrid", arm, 0.0, refuted=math.inf) for arm in UNIFORM),
        *(difference(arm, STANDARD, 0.1, refuted=math.inf) for arm in HYBRID),
        at_most("loss: median of the hybrids - Standard", _hybrids, 0.1, refuted=0.2),
        *(difference("MLP", arm, 0.0) for arm in SKIP),
        *(
            at_most(
                f"exponent: {arm} - Standard cost",
                lambda at, arm=arm: at[arm]["exponent"] - at["Standard cost"]["exponent"],  # type: ignore[misc]
                0.0,
                refuted=math.inf,
            )
            for arm in COST
            if arm != "Standard cost"
        ),
    ),
    needs=(learnt(STANDARD),),
    requires=REQUIRES,
    data=lambda: standard_library(SIZES.length).describe(),
    alone=("cost",),
)
