"""Sparse query attention: fewer query heads, for less work on whole sequences.

Speed: the attention core of one layer of width 256 with 16 heads, as its projection feeds it, in
fp32; the last rows of every arm are checked, then the arms take turns in one run. Quality: small
language models on bytes, 3 layers of width 128 with 8 heads, learning rates tuned for every arm
alike. All arms have the same width of a head, so those with fewer heads are smaller, as in the
paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from foveate.ops import Mask, attention, causal
from foveate.ops.errors import FoveateError
from foveate.papers.harness import Check, Found, Grid, Paper, Trial, at_most, difference, ratio
from foveate.papers.tasks import standard_library
from foveate.papers.training.language import (
    REQUIRES,
    Sizes,
    language_model,
    learnt,
    trained_on_bytes,
)

# Query and key/value heads as shares of the model's heads; 0 is one head.
SHARES = {
    "MHA": (1, 1),
    "GQA": (1, 1 / 4),
    "MQA": (1, 0),
    "SQA": (1 / 2, 1 / 4),
    "sSQA": (1 / 2, 1 / 2),
    "xSQA": (1 / 4, 1 / 4),
    "xSMQA": (1 / 4, 0),
}
LENGTHS = (1024, 4096, 8192)
STEPS = 500
ROWS = 64  # that are checked


def projection(arm: str, heads: int) -> str:
    """The arm's projection in a model of so many heads."""
    query, kv = (max(1, round(share * heads)) for share in SHARES[arm])
    if query == heads:
        return f"gqa(kv_heads={kv})"
    return f"sqa(query_heads={query}, kv_heads={kv})"


def run(trial: Trial) -> Found:
    """Time all arms, or train one."""
    if trial.cell == "speed":
        return speed(trial)
    sizes = Sizes(layers=3, dim=128, heads=8, length=128)
    given = projection(trial.cell, sizes.heads)
    _, found = trained_on_bytes(trial, lambda: language_model(sizes, given), steps=STEPS)
    return {trial.cell: found}


@torch.no_grad()
def speed(trial: Trial) -> Found:
    """Seconds of each arm's core, median of rounds in which all arms take turns; counted FLOPs.

    Raises:
        FoveateError: an arm's output is wrong, so that its seconds would say nothing.
    """
    from foveate.nn import Attention
    from foveate.runs.timing import Pace, race

    lengths = tuple(n // 32 for n in LENGTHS) if trial.quick else LENGTHS
    found: dict[str, dict[str, Any]] = {arm: {} for arm in SHARES}
    for number, (n, real) in enumerate(zip(lengths, LENGTHS)):
        trial.tell(number / len(lengths), f"{n} tokens")
        x = torch.randn(1, n, 256, device=trial.device)
        calls: dict[str, Callable[[], Tensor]] = {}
        for arm in SHARES:
            layer = Attention(256, 16, projection=projection(arm, 16)).to(trial.device)
            q, k, v = (
                layer.projection.query(x),
                *layer.projection.expand(layer.projection.entries(x)),
            )
            for tail, mask in (("", None), (" causal", causal())):
                name = arm + tail
                calls[name] = partial(_attended, q, k, v, mask)
                last = attention(q[:, :, -ROWS:], k, v, mask, backend="reference").out
                _right(f"{name}, {n} tokens", calls[name]()[:, :, -ROWS:], last)
            found[arm]["FLOPs"] = causal().layout(n, n).flops(1, q.shape[1], 16, 16)
        samples = race(calls, Pace(repeats=3))
        for arm in SHARES:
            for tail in ("", " causal"):
                found[arm][f"seconds {real}{tail}"] = median(samples[arm + tail].wall)
    return found


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
    """The output, when it is there."""
    out = attention(q, k, v, mask).out
    if q.is_cuda:
        torch.cuda.synchronize(q.device)
    return out


def _right(what: str, found: Tensor, right: Tensor) -> None:
    error = (found - right).abs().max().item()
    if not error <= 1e-4 * right.abs().max().item():
        raise FoveateError(
            f"sqa: the attention of {what} is off by {error:.1e}, so its speed says nothing; "
            "please report this, with the environment that foveate explain prints."
        )


def _as_fast(arm: str, metric: str) -> tuple[Check, Check]:
    at_most_faster = at_most(
        f"{metric}: MHA / {arm}",
        lambda at: at["MHA"][metric] / at[arm][metric],
        1.15,
        refuted=math.inf,
    )
    return ratio("MHA", arm, 0.9, metric, refuted=-math.inf), at_most_faster


def _flops(arm: str, times: float) -> Check:
    return at_most(
        f"|FLOPs: MHA / {arm} - {times:g}|",
        lambda at: abs(at["MHA"]["FLOPs"] / at[arm]["FLOPs"] - times),
        0.0,
        exact=True,
    )


WHOLE = f"seconds {LENGTHS[-1]}"
MASKS = (WHOLE, f"{WHOLE} causal")
PAPER = Paper(
    key="sqa",
    claim="Halving or quartering the query heads makes attention on whole sequences two or four "
    "times as fast, at a small loss of quality; sharing key/value heads alone does not.",
    metric="seconds of the attention core at 8192 tokens, fp32; test loss in nats for each byte",
    cells=("speed", *SHARES),
    run=run,
    baseline=("MHA", "GQA", "MQA"),
    ours=("SQA", "sSQA", "xSQA", "xSMQA"),
    checks=(
        *(_flops(arm, times) for arm, times in
          (("SQA", 2), ("sSQA", 2), ("xSQA", 4), ("GQA", 1), ("MQA", 1))),
        *(ratio("MHA", arm, 1.6, metric) for arm in ("SQA", "sSQA") for metric in MASKS),
        *(ratio("MHA", "xSQA", 2.8, metric) for metric in MASKS),
        *(check for arm in ("GQA", "MQA") for metric in MASKS for check in _as_fast(arm, metric)),
        difference("MHA", "GQA", 0.0, refuted=math.inf),
        difference("MHA", "sSQA", 0.0, refuted=math.inf),
        difference("sSQA", "MQA", 0.02),
        *(difference(arm, "xSMQA", 0.0, refuted=math.inf) for arm in SHARES if arm != "xSMQA"),
    ),
    needs=(learnt("MHA"),),
    requires=REQUIRES,
    data=lambda: standard_library().describe(),
    grid=Grid("learning rate", (2e-3, 3e-3), cells=tuple(SHARES), share=0.4),
    alone=("speed",),
)  # fmt: skip
