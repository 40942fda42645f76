"""Generalized neighborhood attention: a stride that fits the tiles makes skipped work skipped time.

Speed: one head of 64, fp32, one thread, processor time; a grid of 128 x 128 with window 48 x 48
and one of 16 x 32 x 32 with window 8 x 16 x 16, strides taking turns with dense attention, the
better of torch's SDPA and the core op over everything. "bound" is what `foveate.cost.tiles` says
before the run, for an executor that never waits.

Quality, exploratory: a small diffusion transformer, 4 layers of width 64, learns to denoise 16 x 16
images of overlapping shapes with dense attention; windows of 10 x 10 with growing strides, and
blocks of 8 x 8, are then put in its place, without training, and with a tenth of the steps more.
"border" is the squared error on the pixels at the blocks' borders, over the pixels' variance.
"""

from __future__ import annotations

import math
from copy import deepcopy
from statistics import median
from typing import Any

import torch
from torch import Tensor

from foveate.papers.harness import Check, Found, Paper, Trial, at_least, at_most, difference
from foveate.papers.tasks.base import generator

Tile = tuple[int, ...]
# Grid, window, query tile, key tile, strides; a quick run halves all but strides of 1.
GRIDS: dict[str, tuple[Tile, Tile, Tile, Tile, tuple[Tile, ...]]] = {
    "2-D": ((128, 128), (48, 48), (16, 16), (8, 8), ((1, 1), (16, 1), (1, 16), (16, 16))),
    "3-D": (
        (16, 32, 32), (8, 16, 16), (4, 8, 8), (2, 8, 8),
        ((1, 1, 1), (4, 1, 1), (4, 8, 1), (4, 8, 8), (4, 16, 16)),
    ),
}  # fmt: skip
STEPS, SIDE = 1000, 16
SWAPS = {
    "s=1": "gna(window=10)",
    "s=2": "gna(window=10, stride=2)",
    "s=5": "gna(window=10, stride=5)",
    "block 8": "gna(window=8, stride=8)",
}
SLIDING = ("s=1", "s=2", "s=5")


def run(trial: Trial) -> Found:
    """Time the strides, or train and swap."""
    return speed(trial) if trial.cell == "speed" else quality(trial)


def _arm(grid: str, stride: Tile) -> str:
    return f"{grid} {'x'.join(map(str, stride))}"


@torch.no_grad()
def speed(trial: Trial) -> Found:
    """Times as fast as dense attention, and the bound, by stride."""
    from foveate.cost.tiles import simulate
    from foveate.methods.gna import GNA
    from foveate.ops import attention, neighborhood
    from foveate.runs.timing import Pace, race

    found: dict[str, dict[str, Any]] = {}
    random = torch.Generator().manual_seed(trial.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, (name, (*sizes, strides)) in enumerate(GRIDS.items()):
            trial.tell(number / len(GRIDS), name)
            if trial.quick:
                sizes = [tuple(n // 2 for n in size) for size in sizes]
            shape, window, q_tile, kv_tile = sizes
            q, k, v = torch.randn(3, 1, 1, math.prod(shape), 64, generator=random).unbind(0)
            calls: dict[str, Any] = {
                "sdpa": lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(
                    q, k, v
                ),
                "dense": lambda q=q, k=k, v=v: attention(q, k, v),
            }
            for stride in strides:
                small = tuple(max(1, s // 2) for s in stride) if trial.quick else stride
                mask = neighborhood(shape, window, small)
                visited = simulate(mask, q_tile, kv_tile)
                arm = _arm(name, stride)
                found[arm] = {"bound": visited.serial, "operations": visited.flops}
                method = GNA(window, stride=small, shape=shape, q_tile=q_tile, kv_tile=kv_tile)
                calls[arm] = lambda m=method, q=q, k=k, v=v: m(q, k, v)
            samples = race(calls, Pace(repeats=3))
            seconds = {call: median(sample.cpu) for call, sample in samples.items()}
            dense = min(seconds["sdpa"], seconds["dense"])
            found[f"{name} dense"] = {"seconds": dense}
            for stride in strides:
                arm = _arm(name, stride)
                found[arm] |= {"seconds": seconds[arm], "speed": dense / seconds[arm]}
    finally:
        torch.set_num_threads(threads)
    return found


def images(count: int, *what: object) -> tuple[Tensor, Tensor, Tensor]:
    """(clean images (n, 1, 16, 16) of overlapping shapes, noisy ones, the noise's step (n,)).

    Three discs or squares of random place, size and brightness, the later ones in front; noise of
    a standard deviation between 0.1 and 0.6. They depend on `what` alone.
    """
    random = generator("gna shapes", *what)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    clean = torch.zeros(count, SIDE, SIDE)
    for _ in range(3):
        drawn = torch.rand(5, count, 1, 1, generator=random)
        away = torch.stack((y - drawn[0] * SIDE, x - drawn[1] * SIDE)).abs()
        round_ = away.square().sum(0).sqrt()
        far = torch.where(drawn[2] < 0.5, round_, away.amax(0))
        light = (2 * drawn[4] - 1).sign() * (0.4 + 0.6 * (2 * drawn[4] - 1).abs())
        clean = torch.where(far < 2 + 3 * drawn[3], light, clean)
    sigma = 0.1 + 0.5 * torch.rand(count, generator=random)
    noise = torch.randn(clean.shape, generator=random)
    noisy = clean + sigma[:, None, None] * noise
    return clean[:, None], noisy[:, None], 100 * sigma


def _train(
    model: Any, trial: Trial, steps: int, lr: float, first: int, told: tuple[float, float]
) -> None:
    """Some steps on batches that are numbered from `first`; progress goes between `told`."""
    from foveate.papers.training.regime import Regime, optimizer_of, schedule_of

    regime = Regime(steps=steps, lr=lr, seed=trial.seed, weight_decay=0.01)
    optimizer = optimizer_of(model, regime)
    schedule = schedule_of(optimizer, regime)
    model.train()
    for step in range(steps):
        clean, noisy, at = (
            x.to(trial.device) for x in images(regime.batch, "train", trial.seed, first + step)
        )
        loss = (model(noisy, at) - clean).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), regime.clip)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            share = told[0] + (told[1] - told[0]) * step / steps
            trial.tell(share, f"step {step}, error {loss.item():.3f}")


@torch.no_grad()
def _errors(model: Any, trial: Trial, kind: str) -> dict[str, float]:
    """Squared error over the pixels' variance: of all pixels, and of those at blocks' borders."""
    model.eval()
    clean, noisy, at = (x.to(trial.device) for x in images(32 if trial.quick else 512, "test"))
    parts = [model(*some) for some in zip(noisy.split(32), at.split(32))]
    off = (torch.cat(parts) - clean).square() / clean.var()
    middle = torch.zeros(SIDE, SIDE, dtype=torch.bool, device=trial.device)
    middle[SIDE // 2 - 1 : SIDE // 2 + 1] = True
    middle |= middle.T.clone()
    return {f"error {kind}": off.mean().item(), f"border {kind}": off[..., middle].mean().item()}


def quality(trial: Trial) -> Found:
    """Train a dense denoiser; swap its attention, and train each a little more."""
    from foveate.models import DiT

    steps = 4 if trial.quick else STEPS
    model = DiT((SIDE, SIDE), (1, 1), channels=1, dim=64, depth=4, num_heads=4).to(trial.device)
    _train(model, trial, steps, 2e-3, 0, (0.0, 0.6))
    arms = {"dense": "full", **SWAPS}
    found: dict[str, dict[str, Any]] = {}
    more = max(1, steps // 10)
    for number, (arm, attention) in enumerate(arms.items()):
        swapped = deepcopy(model).swap(attention)
        found[arm] = _errors(swapped, trial, "swapped")
        begin = 0.6 + 0.4 * number / len(arms)
        _train(swapped, trial, more, 2e-4, steps, (begin, begin + 0.4 / len(arms)))
        found[arm] |= _errors(swapped, trial, "tuned")
    return found


def _near_bound(arm: str) -> tuple[Check, Check]:
    def share(at: Found) -> float:
        return float(at[arm]["speed"] / at[arm]["bound"])

    name = f"speed / bound: {arm}"
    return at_least(name, share, 0.85), at_most(name, share, 1.2, refuted=math.inf)


def _reaches(arm: str, whole: bool) -> Check:
    """Only strides that fit the tiles reach what the operations allow."""

    def share(at: Found) -> float:
        return float(at[arm]["bound"] / at[arm]["operations"])

    name = f"bound / operations: {arm}"
    if whole:
        return at_least(name, share, 1.0, exact=True)
    return at_most(name, share, 0.95, exact=True)


def _faster(one: str, two: str) -> Check:
    return at_least(f"speed: {one} / {two}", lambda at: at[one]["speed"] / at[two]["speed"], 1.0)


def _kept(kind: str) -> tuple[Check, ...]:
    """Strides cost little, blocks more, at the blocks' borders; alone it refutes nothing."""
    metric = f"border {kind}"

    def spread(at: Found) -> float:
        values = [at[arm][metric] for arm in SLIDING]
        gap = at["block 8"][metric] - sum(values) / len(values)
        return float(max(values) - min(values) - gap / 2)

    strided = (difference("s=1", arm, 0.0, metric, refuted=math.inf) for arm in ("s=2", "s=5"))
    block = (difference(arm, "block 8", 0.0, metric, refuted=math.inf) for arm in SLIDING)
    name = f"{metric}: spread of strides - half of the blocks' gap"
    return (*strided, *block, at_most(name, spread, 0.0, refuted=math.inf))


STRIDES = [(_arm(name, stride), all(s > 1 for s in stride) and stride[-1] == 16)
           for name, grid in GRIDS.items() for stride in grid[-1]]  # fmt: skip
PAPER = Paper(
    key="gna",
    claim="Which strides turn skipped operations into time can be told by counting tiles: those "
    "that fit the tiles reach the ratio of operations, and cost little quality where blocks do.",
    metric="times as fast as dense attention, one thread, processor time; squared error of a "
    "denoiser over the pixels' variance",
    cells=("speed", "quality"),
    run=run,
    baseline=("2-D dense", "3-D dense", "dense", "block 8"),
    ours=(*(arm for arm, _ in STRIDES), *SLIDING),
    checks=(
        *(_reaches(arm, whole) for arm, whole in STRIDES),
        *(check for arm, _ in STRIDES for check in _near_bound(arm)),
        _faster("2-D 16x16", "2-D 16x1"),
        _faster("2-D 16x1", "2-D 1x1"),
        _faster("3-D 4x16x16", "3-D 4x1x1"),
        _faster("3-D 4x1x1", "3-D 1x1x1"),
        *_kept("swapped"),
        *_kept("tuned"),
    ),
    needs=(at_most("error: dense", lambda at: at["dense"]["error swapped"], 0.5),),
    alone=("speed",),
)
