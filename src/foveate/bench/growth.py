"""How a method's time grows with the length: forward and backward of one layer's attention.

    python -m foveate.bench.growth "combiner(size={root})" "sea(max_length=65536)" --longest 65536

For each length from --shortest on, doubled, seconds of a forward and a backward of random q, k and
v under a causal mask, all methods and dense attention in turn, and over all lengths the exponent of
a power law. `{root}` in a method is the power of two nearest to the square root of the length.
Speeds are only given if, at --check tokens, nine of ten rows of a method's output are those of the
same method in float64 in plain torch (a choice by scores may fall otherwise in the tenth).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.bench.machine import environment
from foveate.methods import make
from foveate.ops import causal
from foveate.ops.errors import FoveateError, InputError
from foveate.parts import Attention, AttentionRecipe, Context, Heads
from foveate.parts.growth import exponent
from foveate.runs.timing import Pace, race, spread

DENSE = "full"
TOLERANCE = 1e-3


def attention_of(text: str, heads: Heads, length: int) -> Attention:
    """The attention that a text names at a length.

    Raises:
        InputError: the text names no attention.
    """
    root = 1 << round(math.log2(length) / 2)
    made = make(text.replace("{root}", str(root)))
    if isinstance(made, AttentionRecipe):
        torch.manual_seed(0)
        made = made.build(heads)
    if not isinstance(made, Attention):
        raise InputError(f"{text!r} is no attention; expected one such as combiner(size=64).")
    return made


def _tensors(heads: Heads, length: int) -> list[Tensor]:
    torch.manual_seed(length)
    shapes = ((heads.query, heads.key_dim), (heads.kv, heads.key_dim), (heads.kv, heads.value_dim))
    made = [torch.randn(1, h, length, d) for h, d in shapes]
    return [*made, torch.randn(1, length, heads.dim)]


def _once(method: Attention, tensors: list[Tensor], weight: Tensor) -> None:
    """A forward and a backward."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    ctx = Context(mask=causal(), hidden=tensors[3], phase="prefill")
    (method(q, k, v, ctx).out * weight).sum().backward()


@torch.no_grad()
def check(text: str, heads: Heads, length: int) -> float:
    """The error of nine rows of ten, as a share of the largest output.

    Raises:
        FoveateError: it is too large for a speed to say anything.
    """
    tensors = _tensors(heads, length)
    method = attention_of(text, heads, length)
    out = method(*tensors[:3], Context(mask=causal(), hidden=tensors[3])).out
    wide = copy.deepcopy(method)
    if isinstance(wide, nn.Module):
        wide.double()
    ctx = Context(mask=causal(), hidden=tensors[3].double(), backend="blocks")
    want = wide(*(x.double() for x in tensors[:3]), ctx).out
    rows = (out.double() - want).abs().amax(-1).flatten()
    error = float(rows.quantile(0.9) / want.abs().max())
    if not error <= TOLERANCE:
        raise FoveateError(f"{text} is off by {error:.1e} of its largest output: no speed.")
    return error


def measure(
    texts: Sequence[str], heads: Heads, lengths: Sequence[int], pace: Pace, checked: int
) -> dict[str, Any]:
    """Seconds by method and length, dense attention beside them, and exponents.

    Args:
        texts: methods.
        heads: sizes.
        lengths: tokens, rising.
        pace: how long to measure at each.
        checked: tokens at which outputs are checked.

    Raises:
        FoveateError: an output is wrong.
    """
    names = [DENSE, *(text for text in texts if text != DENSE)]
    found: dict[str, Any] = {name: {"error": check(name, heads, checked)} for name in names}
    for length in lengths:
        tensors = _tensors(heads, length)
        weight = torch.randn(1, heads.query, length, heads.value_dim)
        calls: dict[str, Callable[[], object]] = {
            name: partial(_once, attention_of(name, heads, length), tensors, weight)
            for name in names
        }
        for name, sample in race(calls, pace).items():
            found[name][str(length)] = spread(sample.by(pace.clock))
    for held in found.values():
        seconds = [held[str(length)]["median"] for length in lengths]
        held["exponent"] = exponent(lengths, seconds) if len(lengths) > 1 else None
    return found


def main(given: Sequence[str] | None = None) -> int:
    """The command; JSON on standard output."""
    parser = argparse.ArgumentParser(prog="python -m foveate.bench.growth", description=__doc__)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--shortest", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=65_536)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", type=int, default=512)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    asked = parser.parse_args(given)
    torch.set_num_threads(asked.threads)
    heads = Heads(asked.heads * asked.dim, asked.heads, asked.heads, asked.dim, asked.dim)
    doublings = int(math.log2(asked.longest / asked.shortest)) + 1
    lengths = [asked.shortest << n for n in range(doublings)]
    pace = Pace(repeats=asked.repeats, budget=1e9, clock=asked.clock)
    found = measure(asked.methods, heads, lengths, pace, asked.check)
    about = {"threads": asked.threads, "heads": heads.query, "environment": environment()}
    sys.stdout.write(json.dumps({"seconds": found} | about, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
