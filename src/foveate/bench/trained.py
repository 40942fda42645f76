"""How the work of an attention that is trained grows with the length: pairs and seconds.

    python -m foveate.bench.trained superlinear --lengths 2048 4096 8192 16384

For each length: the pairs of query and key that a head works on at most, as the method counts them,
and seconds of forward and backward together, beside dense causal attention in the same rounds, on
random heads. The exponent is the slope of a line through the logarithms. Seconds are only given if
the method agrees with itself in float64 on plain torch at `--check` tokens, gradients included.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from foveate.bench.machine import environment
from foveate.methods import make
from foveate.ops import attention, causal
from foveate.ops.errors import FoveateError, InputError
from foveate.parts import AttentionRecipe, Context, Heads
from foveate.parts.growth import exponent
from foveate.runs.timing import Pace, race

TOLERANCE = 1e-3


def measure(
    text: str, lengths: Sequence[int], heads: Heads, pace: Pace, check: int, seed: int = 0
) -> dict[str, Any]:
    """Pairs and seconds at each length, and the exponents that fit them.

    Args:
        text: the method.
        lengths: tokens, rising.
        heads: of the layer; a batch of one.
        pace: how long to measure.
        check: tokens at which the method is checked against itself in float64.
        seed: of weights and data.

    Raises:
        InputError: the method has no parameters of its own, or doesn't count its pairs.
        FoveateError: an output or a gradient is wrong, so that seconds would say nothing.
    """
    recipe: Any = make(text)
    if not isinstance(recipe, AttentionRecipe) or not hasattr(recipe, "pairs"):
        raise InputError(
            f"{text!r} isn't an attention that is trained and counts its pairs; expected one such "
            'as "superlinear" or "dma(window=512)".'
        )
    torch.manual_seed(seed)
    method: Any = recipe.build(heads)
    _check(text, method, heads, check)
    found = []
    for length in lengths:
        given = _data(heads, length, torch.float32)
        samples = race(
            {
                "ours": _training(lambda q, k, v, ctx: method(q, k, v, ctx).out, given, method),
                "dense": _training(
                    lambda q, k, v, ctx: attention(q, k, v, ctx.mask).out, given, None
                ),
            },
            pace,
        )
        seconds = {name: median(sample.by(pace.clock)) for name, sample in samples.items()}
        found.append(
            {
                "length": length,
                "pairs": recipe.pairs(length),
                "dense_pairs": length * (length + 1) // 2,
                "seconds": seconds["ours"],
                "dense_seconds": seconds["dense"],
            }
        )
    kinds = ("pairs", "dense_pairs", "seconds", "dense_seconds")
    fitted = {kind: exponent(lengths, [row[kind] for row in found]) for kind in kinds}
    return {"method": text, "lengths": found, "exponents": fitted}


def _data(heads: Heads, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v and the layer's input, of a batch of one."""
    shapes = (
        (1, heads.query, length, heads.key_dim),
        (1, heads.kv, length, heads.key_dim),
        (1, heads.kv, length, heads.value_dim),
        (1, length, heads.dim),
    )
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)


def _gradients(
    run: Callable[..., Tensor], given: tuple[Tensor, ...], method: nn.Module | None
) -> tuple[Tensor, ...]:
    """The output, and the gradients of its mean square."""
    q, k, v, hidden = given
    weights = () if method is None else tuple(method.parameters())
    out = run(q, k, v, Context(mask=causal(), phase="train", hidden=hidden))
    grads = torch.autograd.grad(out.square().mean(), (q, k, v, *weights), allow_unused=True)
    return (out.detach(), *(g for g in grads if g is not None))


def _training(
    run: Callable[..., Tensor], given: tuple[Tensor, ...], method: nn.Module | None
) -> Callable[[], None]:
    def once() -> None:
        _gradients(run, given, method)

    return once


def _check(text: str, method: Any, heads: Heads, length: int) -> None:
    given = _data(heads, length, torch.float32)
    wide = deepcopy(method).double()
    double = tuple(x.detach().double().requires_grad_() for x in given)
    for found, right in zip(
        _gradients(lambda *x: method(*x).out, given, method),
        _gradients(lambda *x: wide(*x).out, double, wide),
    ):
        error = float((found.double() - right).abs().max() / right.abs().max().clamp_min(1e-30))
        if not error <= TOLERANCE:
            raise FoveateError(f"{text} is off by {error:.1e} of the largest: no seconds.")


def main(given: Sequence[str] | None = None) -> int:
    """The command; JSON on standard output."""
    parser = argparse.ArgumentParser(prog="python -m foveate.bench.trained", description=__doc__)
    parser.add_argument("method")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(given)
    torch.set_num_threads(asked.threads)
    width = asked.head_dim
    heads = Heads(asked.heads * width, asked.heads, asked.kv_heads, width, width)
    pace = Pace(repeats=asked.repeats, budget=1e9)
    found = measure(asked.method, asked.lengths, heads, pace, asked.check, asked.seed)
    about = {"threads": asked.threads, "environment": environment()}
    sys.stdout.write(json.dumps(found | about, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
