"""Routing Transformer: clusters found by k-means reach what a local window doesn't.

A sequence of 128 tokens stores 8 pairs (key, value) in its first quarter and asks for their values
in its last one; between them lies noise, and a local head sees at most 32 tokens. Models of 2
layers of width 48 with 4 heads differ in their heads alone: all local (blocks of 16); 2 local and 2
routing heads (8 clusters of 16); the same with members drawn at random, which reach as far but not
by content; full attention. The rate is tuned for all arms alike.

Figures are taken in the form in which a model decodes: members of each query's prefix. "as trained"
is the accuracy with members of the whole sequence. JSD is the mean Jensen-Shannon divergence, in
nats, of two heads' attention at the same query: local and routing heads, two local heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from foveate.methods.routing_transformer import RoutingAttention
from foveate.ops import causal
from foveate.papers.harness import Check, Found, Grid, Paper, Trial, at_least, at_most
from foveate.papers.tasks.base import IGNORED, Batch, Generated, distinct
from foveate.papers.training.language import REQUIRES, Sizes, language_model
from foveate.papers.training.loop import train
from foveate.papers.training.objective import evaluate
from foveate.papers.training.regime import Regime
from foveate.parts import Attention, Context

ROUTING = "routing-transformer(clusters=8, window=16, block=16, decay=0.99{})"
ARMS = {
    "local": ROUTING.format(", local=4"),
    "routing": ROUTING.format(", local=2"),
    "random members": ROUTING.format(", local=2, assignment='random'"),
    "full": "full",
}
STEPS, EARLY = 1000, 250


@dataclass(frozen=True)
class Stores(Generated):
    """Pairs are stored in the first quarter and asked for in the last.

    A token is a key (0 is none) and a value (0 is none): key * (values + 1) + value. Stores have
    both, questions a key alone, all others a random value alone; targets are values from 0.

    Attributes:
        length: a multiple of 4.
        pairs: stores, and questions.
        keys, values: how many there are.
        held: sequences in each of validation and test.
    """

    length: int = 128
    pairs: int = 8
    keys: int = 24
    values: int = 8
    held: int = 512

    @property
    def vocab(self) -> int:
        """Keys and values, each with none."""
        return (self.keys + 1) * (self.values + 1)

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split."""
        quarter, base = self.length // 4, self.values + 1
        size = (count, self.length)
        inputs = torch.randint(1, base, size, generator=random)
        keys = 1 + distinct(count, self.keys, self.pairs, random)
        values = torch.randint(1, base, keys.shape, generator=random)
        stored = distinct(count, quarter, self.pairs, random)
        asked = self.length - quarter + distinct(count, quarter, self.pairs, random)
        inputs.scatter_(1, stored, keys * base + values)
        inputs.scatter_(1, asked, keys * base)
        targets = torch.full(size, IGNORED).scatter_(1, asked, values - 1)
        return Batch(inputs, targets)


class Model(nn.Module):
    """A language model's blocks on sums of a key's, a value's and a place's embedding.

    Args:
        task: whose tokens it reads and whose values it predicts.
        text: of the attention.
        sizes: of the blocks.
    """

    def __init__(self, task: Stores, text: str, sizes: Sizes) -> None:
        super().__init__()
        self.base = task.values + 1
        self.key = nn.Embedding(task.keys + 1, sizes.dim)
        self.value = nn.Embedding(self.base, sizes.dim)
        self.place = nn.Embedding(task.length, sizes.dim)
        self.inner = language_model(sizes, attention=text, position="none")
        self.inner.model.embed_tokens.requires_grad_(False)  # of tokens that aren't sums: unused

    def forward(self, tokens: Tensor) -> Any:
        """Logits of values at each token of (B, L)."""
        x = self.key(tokens // self.base) + self.value(tokens % self.base)
        x = x + self.place.weight[: tokens.shape[1]]
        return self.inner(inputs_embeds=x, use_cache=False)


def run(trial: Trial) -> Found:
    """Train one arm."""
    task = Stores(held=16 if trial.quick else 512)
    sizes = Sizes(layers=2, dim=48, heads=4, length=task.length, vocab=task.values)
    early = 2 if trial.quick else EARLY
    chosen = Regime(
        steps=trial.steps(STEPS), lr=trial.tuned, every=early, floor=1.0, seed=trial.seed
    )
    model = Model(task, ARMS[trial.cell], sizes).to(trial.device)
    done = train(model, task, chosen, folder=trial.folder, tell=trial.tell)
    found: dict[str, Any] = {
        "accuracy": evaluate(model, task, "test", chosen.batch)["accuracy"],
        "early": done.history[0]["accuracy"],  # on the validation split
        "validation": done.history[-1]["validation"],
        "curve": done.curve,
    }
    if trial.cell == "routing":
        found |= divergences(model, task)
        found["pairs"] = pairs(model, task)
        for part in _routed(model):
            part.hyper = replace(part.hyper, form="sequence")
        found["as trained"] = evaluate(model, task, "test", chosen.batch)["accuracy"]
    return {trial.cell: found}


def _routed(model: nn.Module) -> Iterator[RoutingAttention]:
    return (part for part in model.modules() if isinstance(part, RoutingAttention))


class _Watched(Attention, nn.Module):
    """An attention that tells what it is called with."""

    def __init__(self, inner: RoutingAttention, tell: Callable[..., None]) -> None:
        nn.Module.__init__(self)
        self.inner, self.tell = inner, tell

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Any:
        self.tell(self.inner, q, k)
        return self.inner(q, k, v, ctx)


@torch.no_grad()
def divergences(model: Model, task: Stores) -> dict[str, float]:
    """Mean JSD of local and routing heads, and of two local heads, over layers and queries."""
    calls: list[tuple[RoutingAttention, Tensor, Tensor]] = []
    layers = model.inner.model.layers
    kept = [layer.attention.attention for layer in layers]
    for layer, part in zip(layers, kept):
        layer.attention.attention = _Watched(part, lambda *call: calls.append(call))
    try:
        model(next(task.held_out("test", 16)).inputs.to(model.place.weight.device))
    finally:
        for layer, part in zip(layers, kept):
            layer.attention.attention = part
    found: dict[str, list[Tensor]] = {"JSD local, routing": [], "JSD local, local": []}
    for part, q, k in calls:
        # With the unit vectors as values, outputs are the weights of the keys.
        unit = torch.eye(k.shape[2], device=q.device).expand(*k.shape[:3], -1)
        weights = part(q, k, unit, Context(mask=causal())).out
        for one, two in combinations(range(weights.shape[1]), 2):
            if one < part.local:
                name = "JSD local, local" if two < part.local else "JSD local, routing"
                found[name].append(jsd(weights[:, one], weights[:, two]))
    return {name: torch.cat(values).mean().item() for name, values in found.items()}


def jsd(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of rows (..., n); rows without weight are left out."""
    some = (p.sum(-1) > 0) & (q.sum(-1) > 0)
    p, q = (x[some] / x[some].sum(-1, keepdim=True) for x in (p, q))
    m = (p + q) / 2
    return (torch.xlogy(p, p / m).nan_to_num() + torch.xlogy(q, q / m).nan_to_num()).sum(-1) / 2


@torch.no_grad()
def pairs(model: Model, task: Stores) -> float:
    """Pairs that a routing head attends over, in training, as a share of all causal ones."""
    part = next(_routed(model))
    heads = part.heads
    q = torch.randn(1, heads.query, task.length, heads.key_dim, device=model.place.weight.device)
    part.train()
    _, layout = part.layouts(q, q, q, Context(mask=causal()))
    part.eval()
    assert layout is not None
    return layout.pairs / causal().pairs(task.length, task.length)


def _apart(one: str, two: str, metric: str, least: float, **more: Any) -> Check:
    return at_least(
        f"{metric}: {one} - {two}", lambda at: at[one][metric] - at[two][metric], least, **more
    )


PAPER = Paper(
    key="routing-transformer",
    claim="Clusters found by online k-means reach far tokens by their content, where local heads "
    "don't reach and random clusters reach by chance.",
    metric="accuracy at the questions, 0 to 1; early: after 250 of 1000 steps",
    cells=tuple(ARMS),
    run=run,
    baseline=("local", "random members", "full"),
    ours=("routing",),
    checks=(
        _apart("routing", "local", "early", 0.5, refuted=-math.inf),
        _apart("routing", "random members", "early", 0.2, refuted=-math.inf),
        _apart("routing", "random members", "accuracy", 0.0),
        at_least(
            "JSD: local and routing heads - two local heads",
            lambda at: at["routing"]["JSD local, routing"] - at["routing"]["JSD local, local"],
            0.0,
        ),
        at_most(
            "pairs: routing head / full", lambda at: at["routing"]["pairs"], 0.1318, exact=True
        ),
    ),
    needs=(at_least("accuracy: full", lambda at: at["full"]["accuracy"], 0.95),),
    requires=REQUIRES,
    grid=Grid("learning rate", (2e-3, 4e-3), share=0.4),
)
