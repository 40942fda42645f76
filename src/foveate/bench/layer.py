"""One layer's causal attention by a method, against dense causal attention on the same engine.

    python -m foveate.bench.layer "hyperattention" --data clustered --length 131072

Data: `clustered`, queries and keys around 64 unit centroids (4 c + 0.3 N(0, I), scale 1), values
around one vector for each, as in HyperAttention's miniature; or `smollm2`, q, k and v of one layer
of SmolLM2-135M on real text, tiled to the length. Both run in turn in the same rounds; a speed is
only given if the method agrees with itself in float64 on plain torch, at `--check` tokens, and
dense attention with the float64 reference on its last rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from foveate.bench.machine import environment
from foveate.methods import make, make_attention
from foveate.ops import AttentionOutput, attention, causal
from foveate.ops.errors import FoveateError, InputError
from foveate.parts import Attention, Context
from foveate.runs.clusters import clusters
from foveate.runs.timing import Pace, paired, race, spread

DATA = ("clustered", "smollm2")
TOLERANCE = 1e-4
ROWS = 64


def clustered(length: int, heads: int, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """q, k, v (1, heads, length, 64) and the scale."""
    torch.manual_seed(seed)
    made = [clusters(length, 64, 64) for _ in range(heads)]
    q, k, v = (torch.cat(x, 1) for x in zip(*made))
    return q, k, v, 1.0


class _Kept(Attention):
    """Full attention that keeps one layer's q, k and v."""

    def __init__(self, layer: int) -> None:
        self.method = make("full")
        self.layer = layer

    @override
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        if ctx is not None and ctx.layer == self.layer:
            self.q, self.k, self.v = q, k, v
        result: AttentionOutput = self.method(q, k, v, ctx)
        return result


def smollm2(length: int, heads: int, layer: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """The first heads of a layer on 2,048 tokens of text, tiled; heads fit whole groups of 3."""
    from foveate.hf import use
    from foveate.hf.load import load_model
    from foveate.runs.text import default_text

    model, tokenizer, _ = load_model()
    ids = tokenizer(default_text()[:30_000], return_tensors="pt").input_ids[:, :2048]
    sample = _Kept(layer)
    with torch.inference_mode(), use(model, sample):
        model(input_ids=ids)
    group = sample.q.shape[1] // sample.k.shape[1]
    if heads > 1 and heads % group:
        raise InputError(f"--heads {heads}: expected 1 or a multiple of {group} for smollm2.")
    kv = max(1, heads // group)
    times = -(-length // sample.q.shape[2])
    q, k, v = (
        x.repeat(1, 1, times, 1)[:, :n, :length].contiguous()
        for x, n in ((sample.q, heads), (sample.k, kv), (sample.v, kv))
    )
    return q, k, v, q.shape[3] ** -0.5


@torch.inference_mode()
def measure(
    text: str, q: Tensor, k: Tensor, v: Tensor, scale: float, pace: Pace, check: int
) -> dict[str, Any]:
    """Seconds of both, their ratio, and the error of the output.

    Args:
        text: the method.
        q: (1, Hq, L, D).
        k: (1, Hkv, L, D).
        v: (1, Hkv, L, Dv).
        scale: of the scores.
        pace: how long to measure.
        check: tokens at which the method is checked against itself in float64.

    Raises:
        FoveateError: an output is wrong, so that its speed says nothing.
    """
    method, ctx = make_attention(text), Context(mask=causal(), scale=scale)
    kept: dict[str, Tensor] = {}

    def ours() -> None:
        kept["ours"] = method(q, k, v, replace(ctx, store={})).out

    def dense() -> None:
        kept["dense"] = attention(q, k, v, causal(), scale=scale).out

    some = [x[:, :n, :check] for x, n in ((q, q.shape[1] // k.shape[1]), (k, 1), (v, 1))]
    wide = method(*(x.double() for x in some), replace(ctx, store={}, backend="blocks")).out
    _right(text, method(*some, replace(ctx, store={})).out, wide)
    samples = race({"dense": dense, "ours": ours}, pace)
    seconds = {name: sample.by(pace.clock) for name, sample in samples.items()}
    last = (q[:, :, -ROWS:].double(), k.double(), v.double())
    want = attention(*last, causal(), scale=scale, backend="reference").out
    _right("dense attention", kept["dense"][:, :, -ROWS:], want)
    off = kept["ours"] - kept["dense"]
    return {
        "method": text,
        "length": q.shape[2],
        "heads": q.shape[1],
        "seconds": spread(seconds["ours"]),
        "dense_seconds": spread(seconds["dense"]),
        "times_faster": paired(seconds["dense"], seconds["ours"]),
        "relative_error": float(off.norm() / kept["dense"].norm()),
        "mean_row_error": float((off.norm(dim=-1) / kept["dense"].norm(dim=-1)).mean()),
    }


def _right(what: str, found: Tensor, right: Tensor) -> None:
    error = float((found.double() - right).abs().max() / right.abs().max())
    if not error <= TOLERANCE:
        raise FoveateError(f"{what} is off by {error:.1e} of the largest output: no speed.")


def main(given: Sequence[str] | None = None) -> int:
    """The command; JSON on standard output."""
    parser = argparse.ArgumentParser(prog="python -m foveate.bench.layer", description=__doc__)
    parser.add_argument("method")
    parser.add_argument("--data", choices=DATA, default=DATA[0])
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", type=int, default=16_384)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(given)
    torch.set_num_threads(asked.threads)
    make = {"clustered": clustered, "smollm2": smollm2}[asked.data]
    number = asked.seed if asked.data == "clustered" else asked.layer
    q, k, v, scale = make(asked.length, asked.heads, number)
    pace = Pace(repeats=asked.repeats, budget=1e9)
    found = measure(asked.method, q, k, v, scale, pace, min(asked.check, asked.length))
    about = {"data": asked.data, "threads": asked.threads, "environment": environment()}
    sys.stdout.write(json.dumps(found | about, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
