"""VMoBA: pairs of a whole head that compete, in blocks that change from layer to layer.

Small video transformers of 6 layers, width 64 and 4 heads learn to predict the clean clip, given a
noised one (x_t = (1 - t) x_0 + t e, t in 0.1 ... 0.9, squared error), of 6 x 8 x 8 latents of two
bouncing balls: 384 tokens. They differ in their attention alone. Temporal blocks are one frame (6),
spatial ones 2 x 4 over all frames (8), 3-D ones 2 x 4 x 4 (12). Density is the share of pairs that
a model computes on held-out clips. Positions are computed; those of the pilot that the thresholds
are from were learnt.

Exploratory, without training: the dense model's attention is replaced by the best pairs of each
head, or of each query, as many of both, partition by partition; the error is that of the predicted
clip against the dense model's, relative. 500 steps are few and locality is a useful prior here, so
sparse models may well be better than the dense one; longer training brings parity, not victory.

"cost" counts the operations of Wan 2.1 (1.3B) at 93 x 576 x 1024 (55,296 tokens), density 0.19.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops import AttentionOutput
from foveate.papers.harness import Check, Found, Paper, Trial, at_least, at_most
from foveate.parts import Attention, Context

SIZES = (6, 8, 8)
BLOCKS = "frames=1, tile=(2, 4), box=(2, 4, 4)"
LOCAL = "select='topk', topk=(2, 2, 3)"
METHODS = {
    "dense": "full",
    "VMoBA": f"vmoba({BLOCKS}, tau=0.25)",
    "per query": f"vmoba({BLOCKS}, scope='query', tau=0.18)",
    "top-k": f"vmoba({BLOCKS}, scope='query', {LOCAL})",
    "1-D": f"vmoba({BLOCKS}, partitions=('1d',), tau=0.25)",
}
SWAPS = {"1d": 2, "2d": 2, "3d": 3}  # blocks for each query
STEPS, BATCH, HELD = 500, 8, 48
RATE = 1e-3  # of all arms; the attentions have no weights of their own


class Counted(Attention):
    """An attention, and the share of all pairs that its calls computed."""

    def __init__(self, method: Any) -> None:
        self.method = method
        self.densities: list[float] = []

    @override
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        ctx = Context() if ctx is None else ctx
        self.densities.append(self.method.layout(q, k, v, ctx).density)
        result: AttentionOutput = self.method(q, k, v, ctx)
        return result


def model_of(attention: str, seed: int) -> Any:
    """A model with fresh weights, the same ones for every attention."""
    from foveate.models import DiT

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiT(SIZES, (1, 1, 1), dim=64, depth=6, num_heads=4, attention=attention)


def run(trial: Trial) -> Found:
    """Count, or train one model."""
    if trial.cell == "cost":
        return cost()
    from foveate.methods import make
    from foveate.papers.training.denoising import error, fit
    from foveate.papers.training.regime import Regime
    from foveate.runs.clips import Clips

    steps = 4 if trial.quick else STEPS
    clips, held = Clips(SIZES), 4 if trial.quick else HELD
    regime = Regime(
        steps=steps, batch=2 if trial.quick else BATCH, lr=RATE, warmup=min(1.0, 50 / steps),
        weight_decay=0.01, every=max(1, steps // 5), seed=trial.seed,
    )  # fmt: skip
    model = model_of(METHODS[trial.cell], trial.seed).to(trial.device)
    curve = fit(model, clips, regime, folder=trial.folder, tell=trial.tell)
    found: dict[str, Any] = {"curve": curve, "error": error(model, clips, held)}
    arms: dict[str, dict[str, Any]] = {trial.cell: found}
    if trial.cell == "dense":
        clean, _, _ = clips.held_out(held)
        arms["mean clip"] = {"error": float((clean - clean.mean(0)).square().mean())}
        found["density"] = 1.0
        return arms | swapped(model, clips, min(held, 16))
    counted = Counted(make(METHODS[trial.cell]))
    error(deepcopy(model).swap(counted), clips, min(held, 8))
    found["density"] = sum(counted.densities) / len(counted.densities)
    return arms


@torch.no_grad()
def swapped(model: Any, clips: Any, count: int) -> dict[str, dict[str, Any]]:
    """Relative error of the prediction if each head's, or each query's, best pairs are kept."""
    from foveate.models.denoise import STEP, noised

    device = next(model.parameters()).device
    clean, t, noise = (x.to(device) for x in clips.held_out(count))
    seen = noised(clean, t, noise)
    want = model(seen, t * STEP)
    found: dict[str, dict[str, Any]] = {"swapped, head": {}, "swapped, query": {}}
    for kind, topk in SWAPS.items():
        for scope in ("head", "query"):
            text = f"partitions=('{kind}',), select='topk', topk={topk}, scope='{scope}'"
            ours = deepcopy(model).swap(f"vmoba({BLOCKS}, {text})")(seen, t * STEP)
            off = float((ours - want).norm() / want.norm())
            found[f"swapped, {scope}"][f"off {kind}"] = off
    return found


def cost() -> dict[str, dict[str, Any]]:
    """Operations of Wan 2.1 in units of 10^12, dense and at the paper's density."""
    from foveate.cost.video import MODELS

    wan = MODELS["wan-1.3b"]
    full, ours = wan.flops(55_296), wan.flops(55_296, 0.19, (8, 48, 72))
    return {"Wan, dense": {"operations": full / 1e12}, "Wan, VMoBA": {"operations": ours / 1e12}}


def _ratio(over: str, under: str) -> tuple[str, Any]:
    return (
        f"error: {over} / {under}",
        lambda at: float(at[over]["error"] / at[under]["error"]),
    )


def _denser(at: Found) -> float:
    return float(at["VMoBA"]["density"] - at["top-k"]["density"])


def _fewer(at: Found) -> float:
    return float(at["Wan, dense"]["operations"] / at["Wan, VMoBA"]["operations"])


CHECKS: tuple[Check, ...] = (
    at_most(*_ratio("VMoBA", "dense"), 1.02, refuted=1.05),
    at_least(*_ratio("1-D", "VMoBA"), 1.10, refuted=1.0),
    at_most(*_ratio("VMoBA", "top-k"), 1.0, refuted=1.05),
    at_most("density: VMoBA - top-k", _denser, 0.0, refuted=math.inf),
    at_least("operations of Wan: dense / VMoBA", _fewer, 2.825, exact=True),
)

PAPER = Paper(
    key="vmoba",
    claim="Trained with blocks of frames, places and both by turns, of which a head's best pairs "
    "are kept, a video model is as good as with full attention at a fifth of the pairs; blocks of "
    "frames alone are worse, and a fixed number for each query is no better.",
    metric="squared error of predicted clips; share of pairs; operations",
    cells=(*METHODS, "cost"),
    run=run,
    baseline=("dense", "mean clip", "per query", "top-k", "1-D", "swapped, query", "Wan, dense"),
    ours=("VMoBA", "swapped, head", "Wan, VMoBA"),
    checks=CHECKS,
    needs=(at_most(*_ratio("dense", "mean clip"), 0.5),),
    data=lambda: "clips of two bouncing balls, 6 x 8 x 8, generated",
)
