"""Routers that share: do tokens that are routed by their neighbours too learn better experts?

Two tasks:

- specialists: 8 clusters of tokens, each with a linear map of its own to its targets; a sequence
  holds tokens of 2 clusters, so that neighbours tell of a token's cluster. 8 linear experts, 2 for
  a token. SMoE (a linear router), similarity-aware (tau = sqrt(D)), and the paper's other
  baselines: XMoE, SMoE-Dropout, and StableMoE, whose light router reads the input here (there are
  no words) and chooses after half of the training (the best of 10%, which is its paper's, 30% and
  50%, on a world of its own; from there on nothing of it changes, by construction). Each cell is
  the mean of five worlds, drawn anew. "noisy mse" is the error where inputs (not targets) carry
  noise of 0.5; both errors are shares of the targets' variance.
- bytes: language models of 2 layers with 8 experts, 2 for a token, by three routers. "attacked" is
  the loss where a tenth of the words in the input are overwritten by "A", of the bytes outside of
  them. On it no threshold is set.

"entropy" of a token's averaged distribution is in nats, "changed 50%" the share of tokens whose set
of experts differs between half of the training and its end, on the same tokens that aren't trained
on. The paper claims lower entropy too; its bounds (oracle 4) allow it to rise, and here it may, so
it is told and not judged.

"no learning" is a control: a random router is moved a little, with its distributions averaged by
raw similarity or not; averaging alone needn't make a choice steadier.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from foveate.methods import make
from foveate.methods.attn_smoe import SimilarityRelation
from foveate.nn import Router, advance
from foveate.papers.harness import Check, Found, Paper, Trial, at_most, difference
from foveate.papers.tasks import standard_library
from foveate.papers.tasks.base import IGNORED, Batch, generator
from foveate.papers.training.experts import Experts
from foveate.papers.training.language import REQUIRES, Sizes, language_model, trained_on_bytes
from foveate.papers.training.objective import cross_entropy, logits_of
from foveate.papers.training.routing import RoutingWatch
from foveate.parts.balance import load_balance
from foveate.parts.routes import entropy, fluctuation, unevenness
from foveate.parts.routing import Around, RouterSizes

ARMS = {
    "SMoE": "top-k",
    "similarity": "similarity-smoe(tau=4.0)",
    "XMoE": "xmoe",
    "SMoE-Dropout": "smoe-dropout",
    "StableMoE": "stable-moe(first=0.5)",
}
BYTES = {
    "SMoE, bytes": "top-k",
    "similarity, bytes": "similarity-smoe",
    "attention, bytes": "attention-smoe",
}
CONTROL = "no learning"
DIM, CLUSTERS, EXPERTS, ACTIVE = 16, 8, 8, 2
LENGTH, BATCH, STEPS, LR, BALANCE = 24, 48, 700, 5e-3, 0.01
WORLDS, NOISE = 5, 0.5
MOMENTS = (0.5, 0.8, 0.9)
BYTE_STEPS, BYTE_LENGTH, BYTE_LR, SWAPPED = 1000, 64, 2e-3, 0.1


@dataclass(frozen=True)
class World:
    """Clusters with a linear map each; everything follows from the seed.

    Attributes:
        seed: of centres, maps, and of all sequences.
    """

    seed: int

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Centres (C, D) and maps (C, D, D)."""
        random = generator("specialists", self.seed)
        centres = 0.9 * torch.randn(CLUSTERS, DIM, generator=random)
        return centres, torch.randn(CLUSTERS, DIM, DIM, generator=random) / math.sqrt(DIM)

    def draw(self, count: int, split: str, number: int = 0) -> tuple[Tensor, Tensor]:
        """Sequences x (count, L, D) with tokens of 2 clusters each, and targets y of that shape."""
        random = generator("specialists", self.seed, split, number)
        centres, maps = self.parts
        pair = torch.rand(count, CLUSTERS, generator=random).topk(2, dim=1).indices
        z = pair.gather(1, torch.randint(2, (count, LENGTH), generator=random))
        x = centres[z] + torch.randn(count, LENGTH, DIM, generator=random)
        every = torch.einsum("bld,cde->blce", x, maps)
        return x, every.gather(2, z[..., None, None].expand(-1, -1, 1, DIM))[:, :, 0]


class Specialists(nn.Module):
    """Linear experts behind a router: y = sum_e w_e x R_e.

    Args:
        router: text of the catalog.
    """

    def __init__(self, router: str) -> None:
        super().__init__()
        parts = make(router).build(RouterSizes(DIM, EXPERTS))
        self.router = Router(
            DIM, EXPERTS, ACTIVE, renormalize=True, scores=parts.scores, relation=parts.relation
        )
        self.maps = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) / math.sqrt(DIM))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From x (B, L, D) to y of that shape, and the router's losses, weighted."""
        routed = self.router(x)
        every = torch.einsum("bld,edf->blef", x, self.maps)
        y = (routed.weights[..., None] * every).sum(2)
        more = y.new_zeros(())
        if not routed.frozen:
            more = BALANCE * load_balance(routed.spread, routed.chosen, per_slot=True).loss
        if routed.choice_losses is not None:
            more = more + routed.choice_losses.mean()
        return y, more


def run(trial: Trial) -> Found:
    """Run one arm on its task, or the control."""
    if trial.cell == CONTROL:
        return control(trial)
    if trial.cell in BYTES:
        return {trial.cell: on_bytes(trial, BYTES[trial.cell])}
    worlds = [specialists(trial, ARMS[trial.cell], i) for i in range(1 if trial.quick else WORLDS)]
    return {trial.cell: {name: fmean(w[name] for w in worlds) for name in worlds[0]}}


def specialists(trial: Trial, router: str, number: int) -> dict[str, float]:
    """Train on one world and take its figures."""
    world = World(100 * trial.seed + number)
    torch.manual_seed(world.seed)
    model = Specialists(router).to(trial.device)
    steps = 20 if trial.quick else STEPS
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    looked = world.draw(64, "validation")[0].to(trial.device)
    moments = {round(share * steps): f"changed {share:.0%}" for share in MOMENTS}
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(steps):
        if step in moments:
            kept[moments[step]] = choices(model, looked)[1:]
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / steps)
        advance(model, step / steps)
        x, y = (t.to(trial.device) for t in world.draw(BATCH, "train", step))
        found, more = model(x)
        loss = (found - y).square().mean() + more
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            trial.tell(((step / steps) + number) / WORLDS, f"world {number}, step {step}")
    advance(model, 1.0)
    probs, best, chosen = choices(model, looked)
    figures = {name: fluctuation(at, (best, chosen)).chosen for name, at in kept.items()}
    x, y = (t.to(trial.device) for t in world.draw(256, "test"))
    noise = NOISE * torch.randn(x.shape, generator=generator("noise", world.seed)).to(x.device)
    with torch.no_grad():
        error, noisy = (
            ((model(at)[0] - y).square().mean() / y.var()).item() for at in (x, x + noise)
        )
    return figures | {
        "mse": error,
        "noisy mse": noisy,
        "entropy": entropy(probs).mean().item(),
        "load unevenness": unevenness(chosen),
    }


@torch.no_grad()
def choices(model: Specialists, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Averaged distributions (N, E), the best expert (N,), the set (N, E), of tokens x."""
    routed = model.eval().router(x)
    model.train()
    probs, weights, chosen = (
        t.flatten(0, 1).cpu() for t in (routed.probs, routed.weights, routed.chosen)
    )
    return probs, weights.argmax(-1), chosen


@torch.no_grad()
def control(trial: Trial) -> Found:
    """A random router that is moved by a tenth of its weights, with and without averages."""
    world = World(100 * trial.seed)
    x = world.draw(16 if trial.quick else 256, "validation")[0]
    random = generator("control", trial.seed)
    weight = torch.randn(EXPERTS, DIM, generator=random) / math.sqrt(DIM)
    moved = weight + 0.1 * torch.randn(weight.shape, generator=random) / math.sqrt(DIM)
    relation = SimilarityRelation(DIM, math.sqrt(DIM), learned=False)

    def seen(form: Tensor, mixed: bool) -> tuple[Tensor, Tensor, Tensor]:
        probs = (x @ form.T).softmax(-1)
        if mixed:
            probs = relation(x, probs, Around())
        flat = probs.flatten(0, 1)
        top = torch.zeros_like(flat, dtype=torch.bool)
        return flat, flat.argmax(-1), top.scatter(1, flat.topk(ACTIVE).indices, True)

    found: dict[str, dict[str, float]] = {}
    for arm, mixed in (("random router", False), ("random router, averaged", True)):
        before, after = seen(weight, mixed), seen(moved, mixed)
        found[arm] = {
            "changed by a push": fluctuation(before[1:], after[1:]).best,
            "entropy": entropy(before[0]).mean().item(),
        }
    return found


def on_bytes(trial: Trial, router: str) -> dict[str, Any]:
    """Train a language model and take loss, attacked loss, entropy and fluctuation."""
    sizes = Sizes(layers=2, dim=96, heads=4, length=BYTE_LENGTH)
    more = Experts(EXPERTS, ACTIVE, router).fields(sizes.layers, sizes.dim)
    task = standard_library(BYTE_LENGTH, held=16 if trial.quick else 512)
    watch = RoutingWatch(task, trial.folder)
    model, found = trained_on_bytes(
        trial, lambda: language_model(sizes, **more), steps=BYTE_STEPS, lr=BYTE_LR,
        length=BYTE_LENGTH, watch=watch,
    )  # fmt: skip
    last = found["curve"][-1][0]
    figures, _ = watch.look(model)
    return found | {
        "attacked": attacked(model, task.held_out("test", 32), trial.device),
        "entropy": figures["routing_entropy"],
        "load unevenness": figures["load_unevenness"],
        **{f"changed {at / last:.0%}": moved.chosen for at, moved in watch.to_the_end().items()},
    }


@torch.no_grad()
def attacked(model: nn.Module, batches: Iterator[Batch], device: torch.device) -> float:
    """Loss in nats for each byte outside of the words that were overwritten in the input."""
    random, total, count = generator("word swap"), 0.0, 0
    for batch in batches:
        inputs, targets = swapped(batch, random)
        logits = logits_of(model(inputs.to(device)))
        total += cross_entropy(logits, targets.to(device), "sum").item()
        count += int((targets != IGNORED).sum())
    return total / max(1, count)


def swapped(batch: Batch, random: torch.Generator, share: float = SWAPPED) -> Batch:
    """A share of the words in the input overwritten by "A"; bytes of those words aren't scored."""
    ids = batch.inputs
    lower = ids | 32
    letter = ((lower >= ord("a")) & (lower <= ord("z"))) | (ids == ord("_"))
    begins = letter & ~torch.cat((torch.zeros_like(letter[:, :1]), letter[:, :-1]), 1)
    word = begins.cumsum(1)  # the number of the word that a letter is in
    drawn = torch.rand(len(ids), ids.shape[1] + 1, generator=random) < share
    hit = letter & drawn.gather(1, word)
    # Position i predicts the byte at i + 1.
    hidden = torch.cat((hit[:, 1:], torch.zeros_like(hit[:, :1])), 1)
    return Batch(ids.masked_fill(hit, ord("A")), batch.targets.masked_fill(hidden, IGNORED))


def _share(metric: str, **more: Any) -> Check:
    return at_most(
        f"{metric}: similarity / SMoE",
        lambda at: at["similarity"][metric] / at["SMoE"][metric],
        0.85,
        **more,
    )


PAPER = Paper(
    key="attn-smoe",
    claim="Tokens that are routed together with related ones get better and steadier experts.",
    metric="mean squared error over the targets' variance (specialists); nats for a byte (bytes)",
    cells=(*ARMS, CONTROL, *BYTES),
    run=run,
    baseline=("SMoE", "XMoE", "SMoE-Dropout", "StableMoE", "random router", "SMoE, bytes"),
    ours=("similarity", "random router, averaged", "similarity, bytes", "attention, bytes"),
    checks=(
        _share("mse", refuted=1.0),
        _share("noisy mse", refuted=math.inf),
        difference("similarity", "SMoE", 0.0, "changed 50%", refuted=math.inf),
        difference("similarity", "SMoE", 0.0, "changed 80%", refuted=math.inf),
    ),
    needs=(at_most("mse: SMoE", lambda at: at["SMoE"]["mse"], 0.4),),
    seeds=(0, 1, 2, 3),
    requires=REQUIRES,
    data=lambda: f"specialists, {WORLDS} worlds a seed; {standard_library(BYTE_LENGTH).describe()}",
)
