"""BiFormer: regions that choose regions find what a fixed pattern of equal budget doesn't.

Matching regions: 8 x 8 tokens in 16 regions; each token asks for what lies at its own place in the
one region that carries its region's key, anywhere in the image. Models of 2 layers of width 64 with
2 heads attend to all tokens (dense), to 1, 2 or 4 of 16 regions by bi-level routing, or by fixed
patterns: to their own region, and to it and 1 or 3 others, drawn once for each layer and region.
The model of 2 regions is also evaluated with 4, and the share of regions that see their partner in
at least one layer's table is counted, in the layer where it is largest.

Digits: BiFormer's backbone on real images of 32 x 32, 8 x 8 tokens in its first stage, against one
that is equal but for its regions seeing all others, which is dense attention with the same weights.
Rates are tuned for all arms alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods import make
from foveate.methods.biformer import BiLevelRouting
from foveate.models.biformer import BiFormer
from foveate.models.macs import macs, parameters
from foveate.nn import Attention
from foveate.papers.harness import Check, Found, Grid, Paper, Trial, at_least, at_most
from foveate.papers.tasks.base import generator
from foveate.papers.tasks.digits import Digits, ImageClassifier
from foveate.papers.tasks.regions import KEYS, PAYLOADS, MatchingRegions, partners
from foveate.papers.training.loop import train
from foveate.papers.training.objective import evaluate
from foveate.papers.training.regime import Regime
from foveate.parts import Context

GRID, REGIONS, SIDE = (8, 8), 4, 32
ROUTED = {f"BRA k={k}": k for k in (1, 2, 4)}
FIXED = {"own region": 0, "own and 1 random": 1, "own and 3 random": 3}
MATCHING = ("dense", *ROUTED, *FIXED)
DIGITS = {"BiFormer, digits": (4, 2), "dense, digits": (16, 4)}
STEPS, DIGIT_STEPS = 600, 240


@dataclass(frozen=True)
class Fixed(BiLevelRouting):
    """Regions see themselves and `others` that are drawn once for each layer.

    Attributes:
        others: how many.
        seed: of the draw.
    """

    others: int = 0
    seed: int = 0

    @override
    def is_dense(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        return False

    @override
    def choose(self, q: Tensor, k: Tensor, ctx: Context) -> Tensor:
        count = self.partition(q, k, ctx)[0].count
        random = generator("fixed regions", self.seed, ctx.layer)
        far = torch.rand(count, count, generator=random).fill_diagonal_(2.0)
        table = far.argsort(dim=1, descending=True, stable=True)[:, : self.others + 1]
        return table[None].to(q.device)


def attention(arm: str, seed: int) -> Any:
    """What the layers of an arm run."""
    if arm == "dense":
        return make("full")
    if arm in FIXED:
        return Fixed(regions=REGIONS, shape=GRID, others=FIXED[arm], seed=seed)
    return BiLevelRouting(topk=ROUTED[arm], regions=REGIONS, shape=GRID)


class Model(nn.Module):
    """Two pre-norm blocks on sums of a key's, a payload's and a place's embedding.

    Args:
        method: of both layers.
        dim: width.
    """

    def __init__(self, method: Any, dim: int = 64) -> None:
        super().__init__()
        self.key = nn.Embedding(KEYS, dim)
        self.payload = nn.Embedding(PAYLOADS, dim)
        self.place = nn.Embedding(4, dim)
        at = torch.arange(8) % 2
        self.register_buffer("places", (2 * at[:, None] + at).flatten(), persistent=False)
        self.layers = nn.ModuleList(_Block(dim, method) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, PAYLOADS)

    places: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, 64, payloads) of tokens (B, 64)."""
        x = self.key(inputs // PAYLOADS) + self.payload(inputs % PAYLOADS)
        x = x + self.place(self.places)
        for number, layer in enumerate(self.layers):
            x = layer(x, Context(grid=GRID, layer=number))
        return self.head(self.norm(x))

    def swap(self, method: Any) -> None:
        """Attend otherwise, with the same weights."""
        for layer in self.layers:
            layer.attention.attention = method  # type: ignore[union-attr]


class _Block(nn.Module):
    def __init__(self, dim: int, method: Any) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, 2, position="none", bias=True, out_bias=True)
        self.attention.attention = method
        self.feedforward_norm = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = x + self.attention(self.attention_norm(x), ctx=ctx).y
        return x + self.feedforward(self.feedforward_norm(x))


def run(trial: Trial) -> Found:
    """Train one arm on matching regions or on digits."""
    found = on_digits(trial) if trial.cell in DIGITS else matching(trial)
    return {trial.cell: found}


def _regime(trial: Trial, steps: int, batch: int, warmup: float) -> Regime:
    steps = trial.steps(steps)
    return Regime(
        steps=steps,
        batch=batch,
        lr=trial.tuned,
        warmup=warmup,
        weight_decay=0.01,
        every=max(2, steps // 4),
        seed=trial.seed,
    )


def matching(trial: Trial) -> dict[str, Any]:
    """Accuracy of an arm, and what its routing found."""
    task = MatchingRegions(held=16 if trial.quick else 256)
    regime = _regime(trial, STEPS, 32, 100 / STEPS)
    model = Model(attention(trial.cell, trial.seed)).to(trial.device)
    done = train(model, task, regime, folder=trial.folder, tell=trial.tell)
    found: dict[str, Any] = {
        "accuracy": evaluate(model, task, "test", 32)["accuracy"],
        "validation": done.history[-1]["validation"],
        "curve": done.curve,
    }
    if trial.cell == "BRA k=2":
        found["partner is seen"] = partner_share(model, task)
        model.swap(attention("BRA k=4", trial.seed))
        found["accuracy with k=4"] = evaluate(model, task, "test", 32)["accuracy"]
    return found


class _Heard(BiLevelRouting):
    """Routing that keeps the tables of its calls, by layer."""

    tables: dict[int, Tensor]

    @override
    def choose(self, q: Tensor, k: Tensor, ctx: Context) -> Tensor:
        chosen = super().choose(q, k, ctx)
        self.tables[ctx.layer] = chosen
        return chosen


@torch.no_grad()
def partner_share(model: Model, task: MatchingRegions) -> float:
    """Share of regions whose table holds their partner, in the layer where it is largest."""
    heard = _Heard(topk=2, regions=REGIONS, shape=GRID)
    object.__setattr__(heard, "tables", {})
    model.swap(heard)
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for batch in task.held_out("test", 32):
        model(batch.inputs.to(model.places.device))
        want = partners(batch.inputs)[:, :, None].to(model.places.device)
        for layer, table in heard.tables.items():
            seen[layer].append((table == want).any(2).double())
    return max(float(torch.cat(parts).mean()) for parts in seen.values())


def backbone(cell: str) -> BiFormer:
    """A small BiFormer; its first two stages route, to some regions or to all."""
    return BiFormer(
        (1, 1, 1, 1),
        (32, 64, 64, 64),
        10,
        channels=1,
        topk=(*DIGITS[cell], -2, -2),
        regions=(4, 2, 1, 1),
        head_dim=16,
    )


def on_digits(trial: Trial) -> dict[str, Any]:
    """Accuracy on digits, parameters, and products among activations."""
    task = Digits(SIDE, shift=4, held=32 if trial.quick else None)
    regime = _regime(trial, DIGIT_STEPS, 64, 0.1)
    model = ImageClassifier(backbone(trial.cell)).to(trial.device)
    done = train(model, task, regime, folder=trial.folder, tell=trial.tell)
    return {
        "accuracy": evaluate(model, task, "test", 64)["accuracy"],
        "validation": done.history[-1]["validation"],
        "parameters": float(parameters(model)),
        "mixing": float(macs(model, (1, 1, SIDE, SIDE)).mixing),
        "curve": done.curve,
    }


def _accuracy(arm: str) -> Any:
    return lambda at: at[arm]["accuracy"]


def _below(arm: str) -> Check:
    """That a fixed pattern fails, as it does unless it lists the partner by chance."""
    return at_most(f"accuracy: {arm}", _accuracy(arm), 0.5, refuted=math.inf)


def _lead(arm: str, budget: str) -> Check:
    """That routing is ahead of a pattern that sees as many regions."""
    return at_least(
        f"accuracy: {budget} - {arm}",
        lambda at: at[budget]["accuracy"] - at[arm]["accuracy"],
        0.05,
        refuted=0.0,
    )


def digits_lost(at: Mapping[str, Mapping[str, Any]]) -> float:
    """Accuracy of BiFormer above dense attention of equal size."""
    return float(at["BiFormer, digits"]["accuracy"] - at["dense, digits"]["accuracy"])


PAPER = Paper(
    key="biformer",
    claim="Bi-level routing finds the few regions that matter: as accurate as dense attention, far "
    "ahead of fixed patterns that see as many keys.",
    metric="accuracy on held-out images, 0 to 1",
    cells=(*MATCHING, *DIGITS),
    run=run,
    baseline=("dense", *FIXED, "dense, digits"),
    ours=(*ROUTED, "BiFormer, digits"),
    checks=(
        at_least("accuracy: BRA k=2", _accuracy("BRA k=2"), 0.97, refuted=-math.inf),
        at_least("accuracy: BRA k=4", _accuracy("BRA k=4"), 0.97, refuted=0.9),
        *(_below(arm) for arm in FIXED),
        _lead("own and 1 random", "BRA k=2"),
        _lead("own and 3 random", "BRA k=4"),
        at_least(
            "accuracy: BRA k=2 evaluated with k=4",
            lambda at: at["BRA k=2"]["accuracy with k=4"],
            0.9,
            refuted=-math.inf,
        ),
        at_least(
            "regions that see their partner: BRA k=2",
            lambda at: at["BRA k=2"]["partner is seen"],
            0.95,
            refuted=-math.inf,
        ),
        at_least("accuracy on digits: BiFormer - dense", digits_lost, -0.02, refuted=-0.05),
        at_most(
            "parameters: BiFormer - dense",
            lambda at: at["BiFormer, digits"]["parameters"] - at["dense, digits"]["parameters"],
            0.0,
            exact=True,
        ),
        at_most(
            "products among activations: BiFormer / dense",
            lambda at: at["BiFormer, digits"]["mixing"] / at["dense, digits"]["mixing"],
            0.5,
            exact=True,
        ),
    ),
    needs=(
        at_least("accuracy: dense", _accuracy("dense"), 0.97),
        at_least("accuracy: dense, digits", _accuracy("dense, digits"), 0.9),
    ),
    data=lambda: f"{MatchingRegions().describe()}; {Digits(SIDE, shift=4).describe()}",
    grid=Grid("learning rate", (2e-3, 4e-3), share=0.4),
)
