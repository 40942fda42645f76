"""Tensor attention: it solves triple detection, and small entries make it near-linear.

Three parts:

- **Match3**, trained: a position is positive if x_i + x_j1 + x_j2 = 0 mod M for any two positions
  (M = 37, 8 tokens, 63% positives). Tokens are all cosines and sines of 2 pi f x / M and a
  constant; a blank token stands beside them. One attention layer with 2 heads, then
  [features, attention] -> 64 -> 64 -> 1. Tensor attention has heads of 32 with the scale
  1 / sqrt(d), softmax attention heads of 52, so that it has more parameters. Adam, batches of 128,
  balanced accuracy on 1,000 fresh sequences; learning rates are tuned for both alike.
- **degrees**: entries of size B with random signs, so that logits do reach B^3 (order 3) and B^4
  (order 4); n = 40, d = 4: the lowest even degree of Taylor's polynomial whose largest output error
  is at most 1e-4. It must grow with B, and more so for order 4, which needs less below B = 1.
  Errors for uniform entries in [-B, B], whose logits stay far below B^3, are told.
- **time**: the exact form and degree 4 at d = 4, B = 1, from 64 to 1,024 tokens, forward and
  backward, in turns: exponents (theory: 3 and 1), and the length from which the approximation is
  faster, with its error. The exponents are taken over the upper half of the lengths, where the
  constant cost of a call counts less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.methods.tensor_attention import (
    Form,
    TensorAttention,
    full,
    polynomial,
    tensor_attention,
)
from foveate.papers.harness import Check, Found, Grid, Paper, Trial, at_least, at_most
from foveate.papers.tasks.base import generator
from foveate.parts.growth import exponent

TENSOR, SOFTMAX = "tensor", "softmax"
EXACT, FEATURES = "exact", "features"
M, TOKENS = 37, 8
WIDTHS = {TENSOR: 32, SOFTMAX: 52}
STEPS, CHECKED = 4000, 1500
SIZES = (0.5, 1.0, 1.5, 2.0)
LENGTHS = (64, 128, 256, 512, 1024)
ENOUGH = 1e-4


def run(trial: Trial) -> Found:
    """Run one part."""
    if trial.cell == "degrees":
        return degrees(trial)
    if trial.cell == "time":
        return time(trial)
    return {trial.cell: match3(trial)}


# -- Match3 ---------------------------------------------------------------------------------------
class Detector(nn.Module):
    """Logits (B, n) for tokens (B, n): one attention layer and a small network on top."""

    waves: Tensor

    def __init__(self, arm: str) -> None:
        from foveate.nn import Attention

        super().__init__()
        angles = torch.arange(M)[:, None] * torch.arange(1, (M + 1) // 2) * (2 * math.pi / M)
        waves = torch.cat((angles.cos(), angles.sin()), 1)
        self.register_buffer("waves", torch.cat((waves, torch.ones(M, 1)), 1))
        dim = waves.shape[1] + 1
        attention = TensorAttention(scale="1/sqrt(d)", form="exact") if arm == TENSOR else "full"
        self.attention = Attention(
            dim, 2, attention=attention, position="none", head_dim=WIDTHS[arm]
        )
        self.head = nn.Sequential(
            nn.Linear(2 * dim, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Attention sees the blank token as well, which comes first."""
        features = self.waves[tokens]
        blank = torch.zeros_like(features[:, :1])
        blank[..., -1] = 1.0
        seen = self.attention(torch.cat((blank, features), 1)).y[:, 1:]
        logits: Tensor = self.head(torch.cat((features, seen), -1))
        return logits[..., 0]


def drawn(count: int, *what: object) -> tuple[Tensor, Tensor]:
    """Tokens (count, n), and whether a position is the third of a triple that adds up."""
    tokens = torch.randint(M, (count, TOKENS), generator=generator("match3", M, TOKENS, *what))
    sums = tokens[:, :, None, None] + tokens[:, None, :, None] + tokens[:, None, None]
    return tokens, (sums % M == 0).flatten(2).any(-1)


def match3(trial: Trial) -> dict[str, Any]:
    """Train one arm; balanced accuracy along the way."""
    model = Detector(trial.cell).to(trial.device)
    optimizer = torch.optim.Adam(model.parameters(), trial.tuned)
    steps = trial.steps(STEPS, 8)
    split = "validation" if trial.tuning else "test"
    every = max(1, steps // 16)
    curve = []
    for step in range(1, steps + 1):
        tokens, there = (x.to(trial.device) for x in drawn(128, "train", trial.seed, step))
        loss = functional.binary_cross_entropy_with_logits(model(tokens), there.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % every == 0:
            trial.tell(step / steps, f"step {step}, loss {loss.item():.3f}")
        if step % every == 0 or step == min(CHECKED, steps):
            curve.append([float(step), balanced(model, split, trial.device)])
    early = next(share for step, share in curve if step >= min(CHECKED, steps))
    return {
        "validation": 1 - curve[-1][1],
        "early": early,
        "late": curve[-1][1],
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "curve": curve,
    }


@torch.no_grad()
def balanced(model: nn.Module, split: str, device: torch.device) -> float:
    """Mean of the accuracies on positives and on negatives."""
    tokens, there = (x.to(device) for x in drawn(1000, split))
    right = (model(tokens) > 0) == there
    return float((right[there].float().mean() + right[~there].float().mean()) / 2)


# -- degrees --------------------------------------------------------------------------------------
def uniform(size: float, n: int, order: int, dtype: torch.dtype) -> tuple[Tensor, Any, Any]:
    """A query, order - 1 keys with entries in [-size, size], and values in [-1, 1]; d = 4."""
    q, *rest = (torch.rand(1, 1, n, 4, dtype=dtype) * 2 - 1 for _ in range(2 * order - 1))
    return q * size, [k * size for k in rest[: order - 1]], rest[order - 1 :]


@torch.no_grad()
def degrees(trial: Trial) -> Found:
    """The lowest degree that is enough for random signs, and errors for uniform entries."""
    found: dict[str, dict[str, Any]] = {}
    n = 12 if trial.quick else 40
    for order in (3, 4):
        figures: dict[str, Any] = {}
        for size in SIZES:
            q, keys, values = uniform(1.0, n, order, torch.float64)
            spread = q * size, [k * size for k in keys]
            signs = q.sign() * size, [k.sign() * size for k in keys]
            for degree, error in _errors(*spread, values, (2, 4, 6)):
                figures[f"uniform error B={size:g} g={degree}"] = error
            for degree, error in _errors(*signs, values, range(0, 62, 2)):
                if error <= ENOUGH:
                    figures[f"degree B={size:g}"] = float(degree)
                    break
        found[f"order {order}"] = figures
    return found


def _errors(
    q: Tensor, keys: list[Tensor], values: list[Tensor], tried: Iterable[int]
) -> Iterator[tuple[int, float]]:
    """Degrees and the largest error of an output."""
    right = tensor_attention(q, keys, values, form=Form("exact")).out
    for degree in tried:
        p = polynomial("taylor", degree, 1.0)
        yield degree, float((full(q, keys, values, p, 1 / 4).out - right).abs().max())


# -- time -----------------------------------------------------------------------------------------
def time(trial: Trial) -> Found:
    """Seconds of both forms, forward and backward, median of rounds in turns."""
    from foveate.runs.timing import Pace, race

    lengths = tuple(n // 8 for n in LENGTHS) if trial.quick else LENGTHS
    found: dict[str, dict[str, Any]] = {EXACT: {}, FEATURES: {}}
    forms = {EXACT: Form("exact"), FEATURES: Form("features", degree=4, tolerance=math.inf)}
    faster = math.inf
    for number, (n, real) in enumerate(zip(lengths, LENGTHS)):
        trial.tell(number / len(lengths), f"{n} tokens")
        q, keys, values = uniform(1.0, n, 3, torch.float32)
        calls: dict[str, Callable[[], None]] = {}
        outs = {}
        for name, form in forms.items():
            given = [x.to(trial.device).requires_grad_() for x in (q, *keys, *values)]
            calls[name] = partial(_both, form, *given)
            with torch.no_grad():
                outs[name] = tensor_attention(q, keys, values, form=form).out
        found[FEATURES][f"error {real}"] = float((outs[EXACT] - outs[FEATURES]).abs().max())
        samples = race(calls, Pace(repeats=3))
        for name in forms:
            found[name][f"seconds {real}"] = median(samples[name].wall)
        if (
            faster == math.inf
            and found[FEATURES][f"seconds {real}"] < found[EXACT][f"seconds {real}"]
        ):
            faster = real
    for name in forms:
        longest = LENGTHS[-3:]
        found[name]["exponent"] = exponent(longest, [found[name][f"seconds {n}"] for n in longest])
    found[FEATURES]["faster from"] = min(faster, 2.0 * LENGTHS[-1])
    return found


def _both(form: Form, q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> None:
    out = tensor_attention(q, (k1, k2), (v1, v2), form=form).out
    torch.autograd.grad(out.sum(), (q, k1, k2, v1, v2))
    if q.is_cuda:
        torch.cuda.synchronize(q.device)


# -- the verdict ----------------------------------------------------------------------------------
def _more(high: tuple[str, float], low: tuple[str, float], **more: Any) -> Check:
    names = [f"degree B={size:g}" for _, size in (high, low)]
    return at_least(
        f"degree: {high[0]} B={high[1]:g} - {low[0]} B={low[1]:g}",
        lambda at: at[high[0]][names[0]] - at[low[0]][names[1]],
        2.0,
        **more,
    )


PAPER = Paper(
    key="tensor-attention",
    claim="Attention to pairs solves triple detection, which attention to tokens does not, and is "
    "near-linear where entries are small; the more tokens in a tuple, the smaller they must be.",
    metric="balanced accuracy; seconds, forward and backward; degree for an error of 1e-4",
    cells=(TENSOR, SOFTMAX, "degrees", "time"),
    run=run,
    baseline=(SOFTMAX, EXACT),
    ours=(TENSOR, FEATURES, "order 3", "order 4"),
    checks=(
        at_least(
            f"accuracy at {CHECKED} steps: {TENSOR} - {SOFTMAX}",
            lambda at: at[TENSOR]["early"] - at[SOFTMAX]["early"],
            0.10,
            refuted=0.03,
        ),
        at_least(
            f"accuracy at {STEPS} steps: {TENSOR}", lambda at: at[TENSOR]["late"], 0.95,
            refuted=-math.inf,
        ),
        at_least(
            f"parameters: {SOFTMAX} - {TENSOR}",
            lambda at: at[SOFTMAX]["parameters"] - at[TENSOR]["parameters"],
            0.0,
            exact=True,
        ),
        at_most(f"{FEATURES} faster from", lambda at: at[FEATURES]["faster from"], 512.0),
        at_most("error at 512 tokens", lambda at: at[FEATURES]["error 512"], ENOUGH),
        at_least("exponent: exact", lambda at: at[EXACT]["exponent"], 2.5, refuted=-math.inf),
        at_most("exponent: features", lambda at: at[FEATURES]["exponent"], 1.3, refuted=math.inf),
        *(_more(("order 3", high), ("order 3", low)) for low, high in zip(SIZES, SIZES[1:])),
        _more(("order 4", 2.0), ("order 3", 2.0)),
        _more(("order 3", 0.5), ("order 4", 0.5)),
    ),
    grid=Grid("learning rate", (1e-3, 2e-3, 4e-3), cells=(TENSOR, SOFTMAX), share=0.2),
    alone=("time",),
)  # fmt: skip
