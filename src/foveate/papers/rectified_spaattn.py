"""Rectified SpaAttn: the sparse output, scaled to its share of the mass, and pooled values beside.

A grid of 8 x 16 x 16 tokens with 32 text tokens beside it, head size 32, blocks of 4 x 4 x 4, of
which a quarter or a tenth is computed. Queries and keys are amp (smooth field + 0.3 noise), of one
field, so that tokens attend to those around them; each number of it is an independent Gaussian
field of some length scale and variance 1. Values have a field of their own; text is N(0, I).
Error: that of the visual rows against dense attention, relative, in float64. All arms but "no IPAR"
(whose map ranks otherwise) compute the same blocks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foveate.papers.harness import Found, Paper, Trial, at_least, at_most
from foveate.papers.tasks.base import generator

GRID, BOX, TEXT, DIM = (8, 16, 16), (4, 4, 4), 32, 32
SETTINGS = tuple(
    (scale, amp, drop) for scale in (1.0, 1.5, 2.5) for amp in (1.0, 1.6) for drop in (0.75, 0.9)
)
ARMS: dict[str, dict[str, Any]] = {
    "sparse": {"rectify": False},
    "Rectified": {},
    "no GAPR": {"gapr": False},
    "no IPAR": {"ipar": False},
}


def field(scale: float, random: torch.Generator, dim: int = DIM) -> Tensor:
    """(N, dim) Gaussian fields on the grid, blurred by exp(-d^2 / (2 scale^2)), of variance 1."""
    x = torch.randn(dim, *GRID, generator=random, dtype=torch.float64)
    for axis, side in enumerate(GRID, 1):
        away = torch.arange(side)[:, None] - torch.arange(side)
        blur = torch.exp(-away.double().square() / (2 * scale**2))
        blur = blur / blur.square().sum(1, keepdim=True).sqrt()
        x = torch.einsum("ij,...j->...i", blur, x.transpose(axis, -1)).transpose(axis, -1)
    return x.flatten(1).T


def tensors(scale: float, amp: float, *what: object) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, 1, N + TEXT, DIM), float64."""
    random = generator("fields", scale, *what)
    count = math.prod(GRID)
    made = []
    shared, other = field(scale, random), field(scale, random)
    for factor, smooth in ((amp, shared), (amp, shared), (1.0, other)):
        noise = torch.randn(count, DIM, generator=random, dtype=torch.float64)
        text = torch.randn(TEXT, DIM, generator=random, dtype=torch.float64)
        made.append(torch.cat((factor * (smooth + 0.3 * noise), text))[None, None])
    return made[0], made[1], made[2]


def name_of(setting: tuple[float, float, float]) -> str:
    """A setting in words."""
    scale, amp, drop = setting
    return f"scale {scale:g}, amp {amp:g}, drop {drop:g}"


@torch.no_grad()
def run(trial: Trial) -> Found:
    """All arms at all settings."""
    from foveate.methods.rectified_spaattn import RectifiedSpaAttn
    from foveate.ops import attention
    from foveate.parts import Context

    found: dict[str, dict[str, Any]] = {arm: {} for arm in ARMS}
    count = math.prod(GRID)
    for number, setting in enumerate(SETTINGS):
        trial.tell(number / len(SETTINGS), name_of(setting))
        scale, amp, drop = setting
        q, k, v = (x.to(trial.device) for x in tensors(scale, amp, trial.seed))
        want = attention(q, k, v, backend="reference").out[:, :, :count]
        for arm, change in ARMS.items():
            method = RectifiedSpaAttn(
                drop=drop, p_thr=0.0, box=BOX, neighbours=False, after=TEXT, **change
            )
            ctx = Context(grid=GRID)
            out = method(q, k, v, ctx).out[:, :, :count]
            found[arm][name_of(setting)] = float((out - want).norm() / want.norm())
            layout = method.layout(q, k, Context(grid=GRID))
            found[arm][f"density {drop:g}"] = layout.density
    return found


def worst(arm: str) -> Any:
    """The largest error of an arm as a multiple of the sparse one's, over the settings."""

    def figure(at: Found) -> float:
        names = [name_of(setting) for setting in SETTINGS]
        return max(float(at[arm][name] / at["sparse"][name]) for name in names)

    return figure


PAPER = Paper(
    key="rectified-spaattn",
    claim="At the same blocks, attention scaled by the mass that a pooled map gives to them, with "
    "pooled values for blocks where that gains more than it errs, is nearer to full attention than "
    "block-sparse attention alone; both corrections are needed for that.",
    metric="relative error of the visual rows' output",
    cells=("fields",),
    run=run,
    baseline=("sparse", "no GAPR", "no IPAR"),
    ours=("Rectified",),
    checks=(
        at_most("worst error: Rectified / sparse", worst("Rectified"), 1.0),
        at_least("worst error: no GAPR / sparse", worst("no GAPR"), 1.0, refuted=-math.inf),
        at_least("worst error: no IPAR / sparse", worst("no IPAR"), 1.0, refuted=-math.inf),
    ),
    data=lambda: "Gaussian fields on a grid of 8 x 16 x 16, generated",
    seeds=tuple(range(10)),
)
