"""Rectified SpaAttn: the sparse output, scaled to its share of the mass, and pooled values beside.

A grid of 8 x 16 x 16 tokens with 32 text tokens beside it, head size 32, blocks of 4 x 4 x 4, of
which a quarter or a tenth is computed. Queries and keys are amp (smooth field + 0.3 noise); each
number of a field is an independent Gaussian field of some length scale and variance 1. Values have
a field of their own; text is N(0, I). Error: that of the visual rows against dense attention,
relative, in float64. All arms but "no IPAR" compute the same blocks; its map ranks otherwise, and
text takes a block's place more often, so that its density is lower.

The paper's videos aren't here, and what queries and keys have in common decides what is found, so
both ends are run, with the same thresholds, and all checks of both must hold:

* "two fields": queries and keys are independent, so what a token attends to lies anywhere;
* "one field": both are the same field with noises of their own: tokens attend to those around them.

Not blind: two fields came first, with these thresholds, and were inconclusive (worst error of no
GAPR / sparse 0.794, where at least 1 is needed: making up for all blocks was never worse). Then one
field was tried; its sparse error of 0.563 (scale 1, amp 1, drop 0.75) is that of the pilot that the
thresholds are from, and all checks held. For a time it stood here alone. Draws are new since. The
pilot's rule, that leaving out GAPR or IPAR does harm somewhere, is asked of each of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foveate.papers.harness import Check, Found, Paper, Trial, at_least, at_most
from foveate.papers.tasks.base import generator

GRID, BOX, TEXT, DIM = (8, 16, 16), (4, 4, 4), 32, 32
SETTINGS = tuple(
    (scale, amp, drop) for scale in (1.0, 1.5, 2.5) for amp in (1.0, 1.6) for drop in (0.75, 0.9)
)
FIELDS = ("two fields", "one field")
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


def tensors(fields: str, scale: float, amp: float, *what: object) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, 1, N + TEXT, DIM), float64; one of `FIELDS` says what q and k share."""
    random = generator("two or one", scale, *what)
    count = math.prod(GRID)
    q, k, v = (field(scale, random) for _ in range(3))
    made = []
    for factor, smooth in ((amp, q), (amp, q if fields == "one field" else k), (1.0, v)):
        noise = torch.randn(count, DIM, generator=random, dtype=torch.float64)
        text = torch.randn(TEXT, DIM, generator=random, dtype=torch.float64)
        made.append(torch.cat((factor * (smooth + 0.3 * noise), text))[None, None])
    return made[0], made[1], made[2]


def arm_of(arm: str, fields: str) -> str:
    """An arm on some fields, in words."""
    return f"{arm}, {fields}"


def name_of(setting: tuple[float, float, float]) -> str:
    """A setting in words."""
    scale, amp, drop = setting
    return f"scale {scale:g}, amp {amp:g}, drop {drop:g}"


@torch.no_grad()
def run(trial: Trial) -> Found:
    """All arms at all settings, on the fields that are the cell."""
    from foveate.methods.rectified_spaattn import RectifiedSpaAttn
    from foveate.ops import attention
    from foveate.parts import Context

    found: dict[str, dict[str, Any]] = {arm_of(arm, trial.cell): {} for arm in ARMS}
    count = math.prod(GRID)
    for number, setting in enumerate(SETTINGS):
        trial.tell(number / len(SETTINGS), name_of(setting))
        scale, amp, drop = setting
        q, k, v = (x.to(trial.device) for x in tensors(trial.cell, scale, amp, trial.seed))
        want = attention(q, k, v, backend="reference").out[:, :, :count]
        for arm, change in ARMS.items():
            method = RectifiedSpaAttn(
                drop=drop, p_thr=0.0, box=BOX, neighbours=False, after=TEXT, **change
            )
            told: list[Any] = []
            ctx = Context(grid=GRID, stats=lambda told=told, **said: told.append(said["layout"]))
            out = method(q, k, v, ctx).out[:, :, :count]
            figures = found[arm_of(arm, trial.cell)]
            figures[name_of(setting)] = float((out - want).norm() / want.norm())
            figures[f"density {drop:g}"] = told[0].density
    return found


def worst(arm: str, fields: str) -> Any:
    """The largest error of an arm as a multiple of the sparse one's, over the settings."""

    def figure(at: Found) -> float:
        ours, sparse = (at[arm_of(name, fields)] for name in (arm, "sparse"))
        return max(float(ours[name] / sparse[name]) for name in map(name_of, SETTINGS))

    return figure


def checks_of(fields: str) -> tuple[Check, ...]:
    """The conditions, the same ones on all fields."""

    def name(arm: str) -> str:
        return f"worst error, {fields}: {arm} / sparse"

    return (
        at_most(name("Rectified"), worst("Rectified", fields), 1.0),
        at_least(name("no GAPR"), worst("no GAPR", fields), 1.0, refuted=-math.inf),
        at_least(name("no IPAR"), worst("no IPAR", fields), 1.0, refuted=-math.inf),
    )


PAPER = Paper(
    key="rectified-spaattn",
    claim="At the same blocks, attention scaled by the mass that a pooled map gives to them, with "
    "pooled values for blocks where that gains more than it errs, is nearer to full attention than "
    "block-sparse attention alone; both corrections are needed for that.",
    metric="relative error of the visual rows' output",
    cells=FIELDS,
    run=run,
    baseline=tuple(
        arm_of(arm, fields) for fields in FIELDS for arm in ("sparse", "no GAPR", "no IPAR")
    ),
    ours=tuple(arm_of("Rectified", fields) for fields in FIELDS),
    checks=tuple(check for fields in FIELDS for check in checks_of(fields)),
    data=lambda: "Gaussian fields on a grid of 8 x 16 x 16, of queries and keys two or one",
    seeds=tuple(range(10)),
)
