"""DHSA: chunks that end where the content changes find more than blocks of equal length.

Three parts:

- **segments** (A): keys of 2,048 tokens in segments of log-uniform length 2 ... 128, d = 128, each
  0.5 topic + sigma N(0, I / d) with orthonormal topics; a query for each segment, its topic plus
  N(0, I / d). Share of the segment that a budget of 128 tokens keeps, sigma 8 and 4: equal blocks
  of 64 and as many equal blocks as there are segments, against chunks that are the segments, pooled
  by norm, mean and sum.
- **predicted**: the boundary predictor (C = 64, w = 4) learns the ends of such segments at sigma
  0.5; then A with its boundaries, against equal blocks as before. It trains for 1,000 steps at a
  rate of 1e-3 and cuts wherever its logit is above 0, no two cuts side by side, without the limits
  that a real text needs (the method's defaults); the paper states no figure for this part.
- **model** (B): SmolLM2-135M on 2,048 tokens of Wikipedia, 7 layers: share of dense attention's
  mass, rows from 512 on, that 256 tokens keep for each block of 64 queries (64 local ones among
  them): equal blocks of 64 and of 8, chunks at the jumps of attention's own columns (what the
  predictor learns), scores token by token, the last 256 tokens, and the best tokens there are.
  Beside it the same with the first 32 tokens forced into every arm, on the mass of the others: much
  of what a selector gains on real models is finding the first tokens.

Means are above norms in A: long segments are easier for a mean, whose noise they average out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods import make
from foveate.methods.dhsa import DHSA
from foveate.methods.dhsa.boundaries import equal, pick
from foveate.methods.dhsa.chunks import Pooling, pooled, select
from foveate.methods.dhsa.labels import Jumps, focal_loss, positions
from foveate.methods.dhsa.predictor import BoundaryPredictor
from foveate.ops import AttentionOutput, causal
from foveate.papers.harness import Check, Found, Paper, Trial, at_least
from foveate.papers.tasks.base import generator
from foveate.parts import Attention, Context

OURS, FIXED, EVEN = "chunks", "blocks of 64", "as many equal blocks"
MEAN, SUM = "chunks, means", "chunks, sums"
LESS = ", sigma 4"
PREDICTED, CLEAN_FIXED, CLEAN_EVEN, CLEAN = (
    "predicted chunks", "blocks of 64, sigma 0.5", "as many equal blocks, sigma 0.5",
    "chunks, sigma 0.5",
)  # fmt: skip
MODEL = "SmolLM2: "
ARMS = ("chunks", "chunks, means", "blocks of 64", "blocks of 8", "tokens", "last 256", "best")
SINKS = 32


def run(trial: Trial) -> Found:
    """Run one part."""
    torch.manual_seed(trial.seed)
    parts = {"segments": segments, "predicted": predicted, "model": model}
    return parts[trial.cell](trial)


# -- A --------------------------------------------------------------------------------------------
def drawn(n: int, dim: int, sigma: float, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (n, dim), a query for each segment (segments, dim), and the boundaries."""
    ends = [0]
    while ends[-1] < n:
        length = 2 * 64 ** float(torch.rand((), generator=random))
        # Topics are orthonormal, so there are dim segments at most; the last one takes the rest.
        ends.append(n if len(ends) == dim else min(n, ends[-1] + round(length)))
    bounds = torch.tensor(ends)
    topics = torch.linalg.qr(torch.randn(dim, dim, generator=random)).Q[: len(bounds) - 1]
    noise = torch.randn(n, dim, generator=random) * dim**-0.5
    keys = 0.5 * topics.repeat_interleave(bounds.diff(), 0) + sigma * noise
    queries = topics + torch.randn(topics.shape, generator=random) * dim**-0.5
    return keys, queries, bounds


def kept_share(
    keys: Tensor, queries: Tensor, bounds: Tensor, cut: Tensor, pooling: Pooling, budget: int
) -> float:
    """Mean over the queries of the share of their own segment that is kept, chunks cut at `cut`."""
    n, count = len(keys), len(queries)
    start = torch.zeros(count, dtype=torch.int64)
    scores = queries @ pooled(keys, cut, pooling).T
    kept = select(scores, cut, start, start + n, budget=budget, local=0)
    owner = torch.repeat_interleave(torch.arange(count), bounds.diff())
    own = owner == torch.arange(count)[:, None]
    reachable = own.sum(1).clamp_max(budget)
    return float(((kept & own).sum(1) / reachable).mean())


def even(n: int, count: int) -> Tensor:
    """Boundaries of `count` chunks, equal to within a token."""
    return (torch.arange(count + 1) * n).div(count, rounding_mode="floor")


@torch.no_grad()
def segments(trial: Trial) -> Found:
    """Share of the target segment that each arm keeps."""
    n = 512 if trial.quick else 2048
    found: dict[str, dict[str, float]] = {}
    for sigma, name in ((8.0, ""), (4.0, LESS)):
        shares: dict[str, list[float]] = {}
        for number in range(2 if trial.quick else 10):
            random = generator("segments", trial.seed, sigma, number)
            keys, queries, bounds = drawn(n, 128, sigma, random)
            arms: dict[str, tuple[Tensor, Pooling]] = {
                OURS: (bounds, "norm"), MEAN: (bounds, "mean"), SUM: (bounds, "sum"),
                FIXED: (equal(n, 64), "mean"), EVEN: (even(n, len(bounds) - 1), "mean"),
            }  # fmt: skip
            for arm, (cut, pooling) in arms.items():
                share = kept_share(keys, queries, bounds, cut, pooling, n // 16)
                shares.setdefault(arm, []).append(share)
        for arm, values in shares.items():
            found[arm + name] = {"kept": math.fsum(values) / len(values)}
    return found


# -- A with a predictor ---------------------------------------------------------------------------
def predicted(trial: Trial) -> Found:
    """Train the predictor on segments, then cut other ones where it says."""
    dim, sigma, look = 64, 0.5, 4
    steps, n = (4, 256) if trial.quick else (1000, 1024)
    predictor = BoundaryPredictor(dim, look)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-3)
    for step in range(steps):
        random = generator("train", trial.seed, step)
        keys, _, bounds = drawn(n, dim, sigma, random)
        ends = torch.zeros(n)
        ends[bounds[1:-1] - 1] = 1.0
        loss = focal_loss(predictor(keys[None])[0], ends, look)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            trial.tell(step / steps, "predictor")
    right = said = true = 0
    shares: dict[str, list[float]] = {}
    for number in range(2 if trial.quick else 10):
        keys, queries, bounds = drawn(n, dim, sigma, generator("test", trial.seed, number))
        with torch.no_grad():
            logits = predictor(keys[None])[0]
        at = positions(n, look)
        guess = logits[at] > 0
        real = torch.isin(at, bounds[1:-1] - 1)
        right, said = right + int((guess & real).sum()), said + int(guess.sum())
        true += int(real.sum())
        cut = pick(logits, look=look, theta=0.0, nms=1, most=n)
        arms = {
            PREDICTED: (cut, "norm"), CLEAN: (bounds, "norm"), CLEAN_FIXED: (equal(n, 64), "mean"),
            CLEAN_EVEN: (even(n, len(bounds) - 1), "mean"),
        }  # fmt: skip
        for arm, (where, pooling) in arms.items():
            share = kept_share(keys, queries, bounds, where, pooling, n // 16)  # type: ignore[arg-type]
            shares.setdefault(arm, []).append(share)
    found = {arm: {"kept": math.fsum(x) / len(x)} for arm, x in shares.items()}
    found[PREDICTED]["f1"] = 2 * right / max(1, said + true)
    return found


# -- B --------------------------------------------------------------------------------------------
class Watched(Attention):
    """Full attention that measures what the arms' choices keep of some layers' mass.

    Attributes:
        shares: by arm, and whether the first tokens are forced in, one entry for each layer.
    """

    def __init__(self, layers: frozenset[int], length: int) -> None:
        self.method, self.layers, self.length = make("full"), layers, length
        self.shares: dict[tuple[str, bool], list[float]] = {}

    @override
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        result: AttentionOutput = self.method(q, k, v, ctx)
        if ctx is not None and ctx.layer in self.layers:
            scale = q.shape[3] ** -0.5 if ctx.scale is None else ctx.scale
            self._measure(q.float(), k.float(), scale)
        return result

    def _measure(self, q: Tensor, k: Tensor, scale: float) -> None:
        n, groups = q.shape[2], q.shape[1] // k.shape[1]
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        a = torch.zeros(n, n)  # averaged over heads: what all heads' shared choice keeps of it
        for h in range(q.shape[1]):
            s = scale * q[0, h] @ k[0, h // groups].T
            a += s.masked_fill_(later, -torch.inf).softmax(-1) / q.shape[1]
        budget, block = n // 8, n // 32
        jumps = Jumps(n, 4)
        jumps.add(0, a)
        ratio = jumps.ratio().log() - math.log(2.0)
        ends = pick(ratio.float(), look=4, theta=0.0, nms=8, most=8 * (n // block))
        cuts: dict[str, tuple[Tensor, Pooling]] = {
            "chunks": (ends, "norm"), "chunks, means": (ends, "mean"),
            "blocks of 64": (equal(n, block), "mean"), "blocks of 8": (equal(n, 8), "mean"),
            "tokens": (equal(n, 1), "mean"),
        }  # fmt: skip
        for forced in (False, True):
            sinks = SINKS if forced else 0
            for arm in ARMS:
                if arm in cuts:
                    cut, pooling = cuts[arm]
                    method = DHSA(
                        budget=budget, block=block, local=block, sinks=sinks, instruction=0,
                        pooling=pooling, chunk=8,
                    )  # fmt: skip
                    layout = method.layout_from([cut], q, k, Context(mask=causal()))
                    kept = layout.dense()[0, 0]
                else:
                    kept = _told(a, arm, budget, block, sinks) & ~later
                rows = a[n // 4 :, sinks:]
                share = (rows * kept[n // 4 :, sinks:]).sum(1) / rows.sum(1).clamp_min(1e-9)
                self.shares.setdefault((arm, forced), []).append(float(share.mean()))


def _told(a: Tensor, arm: str, budget: int, block: int, sinks: int) -> Tensor:
    """(n, n) what "last 256" and "best" keep: of each block of queries, alike for its rows."""
    n = len(a)
    at, end = torch.arange(n), (torch.arange(n) // block + 1) * block
    first = at < sinks
    if arm == "last 256":
        return (at >= (end - budget + sinks)[:, None]) & (at < end[:, None]) | first
    mass = a.unflatten(0, (-1, block)).sum(1).masked_fill(first, torch.inf)
    best = mass.topk(budget, -1).indices
    kept = torch.zeros_like(mass, dtype=torch.bool).scatter_(1, best, True)
    return kept.repeat_interleave(block, 0)


@torch.inference_mode()
def model(trial: Trial) -> Found:
    """Recall of dense attention's mass in a real model, without and with forced first tokens."""
    from foveate.hf import use
    from foveate.hf.load import load_model
    from foveate.runs.text import default_text

    lm, tokenizer, _ = load_model(device=trial.device)
    n = 512 if trial.quick else 2048
    start = trial.seed % 64 * 15_000
    text = default_text()[start : start + 12 * n]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :n].to(trial.device)
    count = lm.config.num_hidden_layers
    chosen = torch.linspace(0, count - 1, 2 if trial.quick else 7).round().int().tolist()
    watched = Watched(frozenset(chosen), n)
    with use(lm, watched):
        lm.model(input_ids=ids)
    found: dict[str, dict[str, float]] = {}
    for (arm, forced), values in watched.shares.items():
        metric = "recall beside the sinks" if forced else "recall"
        found.setdefault(MODEL + arm, {})[metric] = math.fsum(values) / len(values)
    return found


# -- what must hold -------------------------------------------------------------------------------
def _above(ours: str, other: str, least: float, metric: str = "kept", **more: Any) -> Check:
    return at_least(
        f"{metric}: {ours} - {other}",
        lambda at: at[ours][metric] - at[other][metric],
        least,
        **more,
    )


PAPER = Paper(
    key="dhsa",
    claim="Chunks that end where the content changes keep more of what is wanted than equal blocks "
    "at the same budget.",
    metric="share of the target segment that is kept; share of attention's mass",
    cells=("segments", "predicted", "model"),
    run=run,
    baseline=(
        FIXED, EVEN, SUM, FIXED + LESS, EVEN + LESS, SUM + LESS, CLEAN_FIXED, CLEAN_EVEN,
        *(MODEL + arm for arm in ARMS[2:]),
    ),
    ours=(OURS, MEAN, OURS + LESS, MEAN + LESS, PREDICTED, CLEAN, *(MODEL + a for a in ARMS[:2])),
    checks=(
        _above(OURS, FIXED, 0.05, refuted=0.0),
        _above(OURS, EVEN, 0.05, refuted=0.0),
        _above(OURS, SUM, 0.0),
        _above(PREDICTED, CLEAN_EVEN, 0.0, refuted=-0.02),
        _above(MODEL + "chunks", MODEL + "blocks of 64", 0.05, "recall", refuted=0.0),
        _above(MODEL + "chunks", MODEL + "blocks of 64", 0.0, "recall beside the sinks",
               refuted=-math.inf),
    ),
    needs=(at_least("F1 of predicted ends", lambda at: at[PREDICTED]["f1"], 0.8),),
    requires=("transformers",),
)  # fmt: skip
