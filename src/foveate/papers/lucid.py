"""LUCID: values decorrelated by their keys are found again where keys are alike.

Five parts:

- **retrieval**, without training: keys k = rms(z + c u), z ~ N(0, I), one u ~ N(0, I) in all of
  them; random values; the query is an earlier key itself, asked at the end. Top-1 by cosine among
  the values, over all keys of several sequences.
- **recall**, trained: 2 layers of width 64 and 2 heads, 256 tokens: 64 tokens that each bind a key
  to a value (the sum of their vectors), then 192 questions, keys again. Keys come from 8 clusters,
  center + 0.2 N(0, I), and stay as they are drawn. Learning rates are tuned for both arms alike.
  Accuracy at equal steps, and steps to 90%.
- **bytes**: small language models, 3 layers of width 128 with 8 heads, that decorrelating costs
  nothing where nothing is to be retrieved. The same learning rates for both.
- **phases**, told without a condition: one layer learns o_i = v_i, then the target becomes the
  running mean. The paper has softmax lose some 1000 times of its Jacobian in phase 1, so that it
  can't adapt. Jacobian: Frobenius norm of the rows' diag(p) - p p^T, for d = 16, n = 64; SGD.
- **cost**: tiles of keys against keys that the solve visits, counted; seconds of attention alone
  and with LUCID, forward and backward, and their exponents (theory: 2 for both), told.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from foveate.methods.lucid import Lucid, normalised, triangle
from foveate.ops import attention, causal
from foveate.papers.harness import Found, Grid, Paper, Trial, at_least, at_most, difference
from foveate.papers.tasks import IGNORED, Batch, standard_library
from foveate.papers.tasks.base import Generated, distinct
from foveate.papers.training.language import (
    REQUIRES,
    Sizes,
    language_model,
    learnt,
    trained_on_bytes,
)
from foveate.papers.training.loop import train
from foveate.papers.training.objective import evaluate
from foveate.papers.training.regime import Regime
from foveate.parts import Context
from foveate.parts.growth import exponent

SOFTMAX, LUCID = "softmax", "LUCID"
ARMS = {SOFTMAX: "full", LUCID: "lucid"}
CASES = {  # d, n, c; and whether LUCID must be far better
    "d=64 n=256 c=2": (64, 256, 2.0),
    "d=64 n=1024 c=2": (64, 1024, 2.0),
    "d=32 n=1024 c=1": (32, 1024, 1.0),
    "d=64 n=1024 c=0": (64, 1024, 0.0),
}
SEQUENCES = 8
STEPS, EVERY = 800, 25
RATES = (2e-3, 4e-3)
LENGTHS = (512, 1024, 2048, 4096)


def run(trial: Trial) -> Found:
    """Run one part."""
    part, _, arm = trial.cell.partition(" ")
    if part == "retrieval":
        return retrieval(trial)
    if part == "recall":
        return {trial.cell: recall(trial, arm)}
    if part == "phases":
        return {f"phases {arm}": phases(trial, arm) for arm in ARMS}
    if part == "cost":
        return cost(trial)
    made = partial(language_model, Sizes(layers=3, dim=128, heads=8, length=128), "mha", ARMS[arm])
    _, found = trained_on_bytes(trial, made, steps=400, lr=2e-3)
    return {trial.cell: found}


# -- retrieval ------------------------------------------------------------------------------------
@torch.no_grad()
def retrieval(trial: Trial) -> Found:
    """Share of keys whose value is found."""
    found: dict[str, dict[str, Any]] = {f"retrieval {arm}": {} for arm in ARMS}
    for name, (d, n, c) in CASES.items():
        count = 1 if trial.quick else SEQUENCES
        k = torch.randn(count, 1, n, d) + c * torch.randn(count, 1, 1, d)
        k, v = normalised(k, 1e-6), torch.randn(count, 1, n, d)
        y = Lucid().prepared(k, v, Context(mask=causal()))
        for arm, values in ((SOFTMAX, v), (LUCID, y)):
            out = attention(k, k, values).out  # asked at the end: every key is seen
            near = nn.functional.normalize(out, dim=-1) @ nn.functional.normalize(v, dim=-1).mT
            right = near.argmax(-1) == torch.arange(n)
            found[f"retrieval {arm}"][name] = float(right.float().mean())
    return found


# -- recall ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bound(Generated):
    """Tokens that bind a key to a value, then keys again, whose values are to be told.

    Token id: key * (values + 1) + value; a question has `values` in the value's place.
    """

    keys: int = 64
    values: int = 64
    length: int = 256
    held: int = 128

    @property
    def vocab(self) -> int:
        """Number of values, which is what is predicted."""
        return self.values

    def draw(self, count: int, random: torch.Generator) -> Batch:
        """Sequences of any split: (count, length)."""
        keys = distinct(count, self.keys, self.keys, random)
        values = torch.randint(self.values, keys.shape, generator=random)
        asked = torch.randint(self.keys, (count, self.length - self.keys), generator=random)
        many = self.values + 1
        inputs = torch.cat((keys * many + values, keys.gather(1, asked) * many + self.values), 1)
        targets = torch.full_like(inputs, IGNORED)
        targets[:, self.keys :] = values.gather(1, asked)
        return Batch(inputs, targets)


class Bindings(nn.Module):
    """The vector of a token: its key's, which is fixed and near those of its cluster, + a value's.

    Args:
        task: whose tokens.
        dim: width.
        clusters: of keys.
        spread: deviation of a key from its cluster's center, whose entries are N(0, 1).
    """

    keys: Tensor

    def __init__(self, task: Bound, dim: int, clusters: int = 8, spread: float = 0.2) -> None:
        super().__init__()
        centers = torch.randn(clusters, dim)[torch.arange(task.keys) % clusters]
        self.register_buffer("keys", centers + spread * torch.randn(task.keys, dim))
        self.values = nn.Embedding(task.values + 1, dim)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, dim)."""
        many = self.values.num_embeddings
        values: Tensor = self.values(ids % many)
        return self.keys[ids // many] + values


def recall(trial: Trial, arm: str) -> dict[str, Any]:
    """Train one arm: accuracy at the end, and the steps after which 90% is first reached."""
    task = Bound(held=8 if trial.quick else 128)
    model = language_model(Sizes(2, 64, 2, task.length, task.vocab), "mha", ARMS[arm])
    model.model.embed_tokens = Bindings(task, 64)
    model.to(trial.device)
    steps = trial.steps(STEPS)
    regime = Regime(
        steps=steps, lr=trial.tuned, every=min(EVERY, steps // 2), seed=trial.seed,
        weight_decay=0.01,
    )  # fmt: skip
    done = train(model, task, regime, folder=trial.folder, tell=trial.tell)
    reached = [entry["step"] for entry in done.history if entry["accuracy"] >= 0.9]
    return {
        "accuracy": evaluate(model, task, "test", regime.batch)["accuracy"],
        "steps to 90%": float(min(reached, default=steps + EVERY)),
        "validation": done.history[-1]["validation"],
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "curve": done.curve,
    }


# -- phases ---------------------------------------------------------------------------------------
def phases(trial: Trial, arm: str) -> dict[str, Any]:
    """The mean Jacobian after each phase, and steps of phase 2 until its loss is below 0.01."""
    torch.manual_seed(trial.seed)
    d, n = 16, 64
    first, second = (20, 20) if trial.quick else (8000, 2000)
    maps = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(2))
    optimizer = torch.optim.SGD(maps.parameters(), 0.3, momentum=0.9)
    means = torch.arange(1, n + 1)[:, None]
    found: dict[str, Any] = {"steps to adapt": float(second)}
    for step in range(first + second):
        x, v = torch.randn(8, 1, n, d), torch.randn(8, 1, n, d)
        q, k = (make(x) for make in maps)
        y = v if arm == SOFTMAX else Lucid().prepared(k, v, Context(mask=causal()))
        scores = (q @ k.mT / math.sqrt(d)).masked_fill(
            torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf
        )
        p = scores.softmax(-1)
        target = v if step < first else v.cumsum(2) / means
        loss = (p @ y - target).square().mean()
        if step >= first and loss < 0.01:
            found["steps to adapt"] = min(found["steps to adapt"], float(step - first))
        if step in (0, first - 1, first + second - 1):
            name = {0: "first", first - 1: "after phase 1"}.get(step, "after phase 2")
            # ||diag(p) - p p^T||_F^2 = sum p^2 - 2 sum p^3 + (sum p^2)^2
            two, three = p.square().sum(-1), p.pow(3).sum(-1)
            size = (two - 2 * three + two.square()).clamp_min(0).sqrt()
            found[f"Jacobian, {name}"] = size[..., 1:].mean().item()
            found[f"loss, {name}"] = loss.item()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(maps.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            trial.tell(step / (first + second), f"{arm}, step {step}")
    return found


# -- cost -----------------------------------------------------------------------------------------
def cost(trial: Trial) -> Found:
    """Counted tiles and FLOPs over those of attention; seconds, forward and backward."""
    from foveate.runs.timing import Pace, race

    n, block, d = 4096, 64, 64
    k = torch.zeros(1, 1, n, d)
    where = triangle(k, 0, block, Context(mask=causal()))
    columns = [sum(run.stop - run.first for run in rows.runs) for rows in where.blocks]
    tiles = sum(-(-seen // block) for seen in columns) + len(where.blocks)
    pairs = sum(block * seen for seen in columns) + len(where.blocks) * block * (block - 1) // 2
    found: dict[str, dict[str, Any]] = {f"cost {arm}": {} for arm in ARMS}
    found["cost LUCID"]["tiles"] = float(tiles)
    # a pair costs 2 d + 2 dv FLOPs in both, of the solve for each key/value head alone
    for group in (1, 4):
        found["cost LUCID"][f"extra FLOPs, groups of {group}"] = round(
            pairs / (group * causal().pairs(n, n)), 3
        )
    lengths = tuple(n // 16 for n in LENGTHS) if trial.quick else LENGTHS
    for number, (length, real) in enumerate(zip(lengths, LENGTHS)):
        trial.tell(number / len(lengths), f"{length} tokens")
        given = [
            torch.randn(1, heads, length, d, device=trial.device, requires_grad=True)
            for heads in (4, 4, 4)
        ]
        calls: dict[str, Callable[[], None]] = {
            SOFTMAX: partial(_both, None, *given),
            LUCID: partial(_both, Lucid(), *given),
        }
        samples = race(calls, Pace(repeats=3))
        for arm in ARMS:
            found[f"cost {arm}"][f"seconds {real}"] = median(samples[arm].wall)
    for figures in found.values():
        longest = LENGTHS[-3:]
        figures["exponent"] = exponent(longest, [figures[f"seconds {n}"] for n in longest])
    return found


def _both(method: Lucid | None, q: Tensor, k: Tensor, v: Tensor) -> None:
    made = attention(q, k, v, causal()) if method is None else method(q, k, v, Context(causal()))
    torch.autograd.grad(made.out.sum(), (q, k, v))
    if q.is_cuda:
        torch.cuda.synchronize(q.device)


# -- the verdict ----------------------------------------------------------------------------------
def _found(case: str) -> Callable[[Found], float]:
    return lambda at: at[f"retrieval {LUCID}"][case] - at[f"retrieval {SOFTMAX}"][case]


PAPER = Paper(
    key="lucid",
    claim="Attention over values decorrelated by their keys retrieves among keys that are alike, "
    "where softmax attention confuses them, at no loss elsewhere.",
    metric="top-1 share; steps to 90% recall; test loss in nats for each byte; FLOPs",
    cells=(
        "retrieval", *(f"recall {arm}" for arm in ARMS), *(f"bytes {arm}" for arm in ARMS),
        "phases", "cost",
    ),
    run=run,
    baseline=tuple(f"{part} {SOFTMAX}" for part in ("retrieval", "recall", "bytes", "phases",
                                                    "cost")),
    ours=tuple(f"{part} {LUCID}" for part in ("retrieval", "recall", "bytes", "phases", "cost")),
    checks=(
        *(at_least(f"top-1, {case}: LUCID - softmax", _found(case), 0.3)
          for case in CASES if not case.endswith("c=0")),
        at_least(
            "top-1, d=64 n=1024 c=0: LUCID - softmax", _found("d=64 n=1024 c=0"), 0.0
        ),
        difference(f"recall {LUCID}", f"recall {SOFTMAX}", 0.0, "steps to 90%"),
        difference(f"bytes {LUCID}", f"bytes {SOFTMAX}", 0.02, refuted=math.inf),
        at_most(
            "|tiles - nb (nb + 1) / 2|, 4096 tokens in blocks of 64",
            lambda at: abs(at["cost LUCID"]["tiles"] - 64 * 65 / 2), 0.0, exact=True,
        ),
        at_most(
            "extra FLOPs of attention", lambda at: at["cost LUCID"]["extra FLOPs, groups of 1"],
            1.0, exact=True,
        ),
        at_most(
            "extra FLOPs of attention, groups of 4",
            lambda at: at["cost LUCID"]["extra FLOPs, groups of 4"], 0.25, exact=True,
        ),
    ),
    needs=(
        at_least(
            "accuracy of recall: the better arm",
            lambda at: max(at[f"recall {arm}"]["accuracy"] for arm in ARMS), 0.9,
        ),
        learnt(f"bytes {SOFTMAX}"),
    ),
    requires=REQUIRES,
    data=lambda: standard_library().describe(),
    grid=Grid("learning rate", RATES, cells=tuple(f"recall {arm}" for arm in ARMS), share=0.5),
    alone=("cost",),
)  # fmt: skip
