"""Mixture-of-head attention: each token chooses which heads count for it.

Small language models on bytes, 3 layers of width 128 with 8 heads: multi-head attention, and
mixtures in which 6 or 4 of the heads count for a token. Half of these are shared, so that 3 of 5
(2 of 6) routed heads are chosen. Beside them: no shared heads, no load-balance loss, and random
routing: W_r stays as it was drawn, and no gradient passes through its choice to the hidden states,
which could otherwise learn to steer it. Gates are normalised, as in the released code. Learning
rates are tuned for every arm alike.

The paper has the mixtures above multi-head attention; at this size they are asked to stay near it,
and to be better than random routing. "pairs" is the part of all (token, head) pairs that counts,
"load" the most-used routed head's load over the least-used one's, in the layer where it is largest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.moh.gates import HeadRouter
from foveate.papers.harness import Check, Found, Grid, Paper, Trial, at_most, difference
from foveate.papers.tasks import standard_library
from foveate.papers.training.language import (
    REQUIRES,
    Sizes,
    language_model,
    learnt,
    trained_on_bytes,
)

ARMS = {
    "MHA": "mha",
    "MoH 75%": "moh(shared=3, active=3)",
    "MoH 50%": "moh(shared=2, active=2)",
    "no shared heads": "moh(shared=0, active=6)",
    "no balance loss": "moh(shared=3, active=3, beta=0.0)",
    "random routing": "moh(shared=3, active=3, beta=0.0)",
}
STEPS = 500


class Drawn(HeadRouter):
    """A router whose W_r stays as it was drawn, and that nothing learns to steer."""

    @classmethod
    def of(cls, router: HeadRouter) -> Drawn:
        """One with the weights of another, which has shared and routed heads."""
        assert router.routed is not None
        made = cls(router.routed.in_features, *router.counts, router.form)
        made.load_state_dict(router.state_dict())
        made.routed.requires_grad_(False)  # type: ignore[union-attr]
        return made

    @override
    def probabilities(self, x: Tensor) -> Tensor:
        return super().probabilities(x.detach())


def run(trial: Trial) -> Found:
    """Train one arm and see how its heads are used."""
    sizes = Sizes(layers=3, dim=128, heads=8, length=128)

    def make() -> Any:
        model = language_model(sizes, ARMS[trial.cell])
        if trial.cell == "random routing":
            for layer in model.model.layers:
                projection = layer.attention.projection
                projection.router = Drawn.of(projection.router)
        return model

    model, found = trained_on_bytes(trial, make, steps=STEPS)
    if trial.cell == "MHA":
        return {trial.cell: found | {"pairs": 1.0}}
    return {trial.cell: found | usage(model, trial)}


@torch.no_grad()
def usage(model: Any, trial: Trial) -> dict[str, float]:
    """Share of pairs that count, and how evenly routed heads are used, on the test split."""
    loads: list[torch.Tensor] = []
    for batch in standard_library(128, held=16 if trial.quick else 512).held_out("test", 64):
        aux = model(batch.inputs.to(trial.device)).aux
        found = [value for name, value in aux.items() if name.endswith("head_load")]
        loads.append(torch.stack(found))
    mean = torch.stack(loads).mean(0)  # (layers, E)
    projection = model.model.layers[0].attention.projection
    counted = projection.shared + mean.sum(1).mean().item()
    uneven = mean.amax(1) / mean.amin(1).clamp_min(1e-3)
    return {
        "pairs": round(counted / (projection.shared + projection.routed), 6),
        "load": uneven.max().item(),
    }


def _load(arm: str) -> Check:
    return at_most(f"load: {arm}", lambda at: at[arm]["load"], 3.0, refuted=math.inf)


def _pairs(arm: str, share: float) -> Check:
    return at_most(f"pairs: {arm}", lambda at: at[arm]["pairs"], share, exact=True)


PAPER = Paper(
    key="moh",
    claim="Three quarters or half of the heads, chosen by each token, are as good as all of them.",
    metric="test loss in nats for each byte",
    cells=tuple(ARMS),
    run=run,
    baseline=("MHA", "random routing"),
    ours=("MoH 75%", "MoH 50%", "no shared heads", "no balance loss"),
    checks=(
        difference("MoH 75%", "MHA", 0.02, refuted=0.05),
        difference("MoH 50%", "MHA", 0.06, refuted=math.inf),
        difference("MoH 75%", "random routing", 0.0),
        _load("MoH 75%"),
        _load("MoH 50%"),
        _pairs("MoH 75%", 0.75),
        _pairs("MoH 50%", 0.5),
    ),
    needs=(learnt("MHA"),),
    requires=REQUIRES,
    data=lambda: standard_library().describe(),
    grid=Grid("learning rate", (2e-3, 3e-3), share=0.4),
)
