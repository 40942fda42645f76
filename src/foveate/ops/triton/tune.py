"""Tuning: the fastest configurations for head sizes, a dtype and this device, kept in a file.

`python -m foveate.ops.triton.tune` does it for head sizes 64 and 128 in bf16; from Python, `tune`.
The problem is causal attention on a long sequence, or one query against a long cache: what is
learnt holds for every mask, and no mask is ever tuned for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.masks import causal
from foveate.ops.triton import MAX_GRADIENT_DIM, backward, forward
from foveate.ops.triton.config import Config, Forced, keep, name_of, shipped

KERNELS = ("forward", "decode", "query gradient", "key gradient")
_LENGTH, _HEADS, _CONTEXT = 4096, 32, 65536


def candidates(kernel: str, dim: int, value_dim: int, itemsize: int, major: int) -> list[Config]:
    """The shipped configuration, and what lies around it."""
    base = shipped(kernel, dim, value_dim, itemsize, major)
    found = [base]
    for rows in (64, 128) if kernel != "decode" else (16,):
        for keys in (32, 64, 128):
            for warps, stages in ((4, 2), (4, 3), (8, 2), (8, 3)):
                found.append(Config(rows, keys, warps, stages))
    # A list of all is long: those whose blocks hold no more than twice of the shipped one's.
    most = 2 * base.rows * base.keys
    found = [c for c in found if c.rows * c.keys <= most]
    if major >= 9 and itemsize == 2:
        found += [replace(c, tma=not c.tma) for c in found]
    return list(dict.fromkeys(found))


def tune(
    dim: int,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kernels: tuple[str, ...] = KERNELS,
    tell: Callable[[str], object] = lambda _: None,
) -> dict[str, Config]:
    """Measure and keep the best configuration of each kernel.

    Args:
        dim: D.
        value_dim: Dv; None is D.
        dtype: of query, key and value.
        kernels: of `KERNELS`; decoding from small pages and latent caches keep what is shipped.
        tell: told a line for each kernel.

    Returns:
        What was kept.

    Raises:
        InputError: a kernel that isn't tuned.
    """
    if unknown := [name for name in kernels if name not in KERNELS]:
        raise InputError(f"kernels: {unknown} can't be tuned; expected some of {KERNELS}.")
    device = torch.device("cuda", torch.cuda.current_device())
    value_dim = dim if value_dim is None else value_dim
    major, _ = torch.cuda.get_device_capability(device)
    found = {}
    for kernel in kernels:
        if "gradient" in kernel and max(dim, value_dim) > MAX_GRADIENT_DIM:
            continue
        call = _problem(kernel, dim, value_dim, dtype, device)
        best, seconds = None, math.inf
        for config in candidates(kernel, dim, value_dim, dtype.itemsize, major):
            try:
                with Forced(config, kernel):
                    mine = _seconds(call)
            except Exception:  # too large for this device: the next one
                continue
            if mine < seconds:
                best, seconds = config, mine
        if best is not None:
            keep(name_of(kernel, dim, value_dim, dtype, device), best)
            found[kernel] = best
            tell(f"{kernel}, head size {dim}: {best}, {seconds * 1e3:.3f} ms")
    return found


def _problem(
    kernel: str, dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    def draw(heads: int, length: int, size: int) -> Tensor:
        return torch.randn(1, heads, length, size, device=device).to(dtype)

    scale = dim**-0.5
    if kernel == "decode":
        q, k, v = draw(_HEADS, 1, dim), draw(8, _CONTEXT, dim), draw(8, _CONTEXT, value_dim)
        return lambda: forward(q, k, v, None, scale, None, None)
    q, k, v = (draw(_HEADS, _LENGTH, size) for size in (dim, dim, value_dim))
    layout = causal().layout(_LENGTH, _LENGTH, (128, 128), device=device)
    if kernel == "forward":
        return lambda: forward(q, k, v, layout, scale, None, None)
    with torch.no_grad():
        out, lse = forward(q, k, v, layout, scale, None, None)
    grad = torch.randn_like(out)
    # Both passes run; the other one takes as long with every candidate.
    return lambda: backward(grad, None, q, k, v, out, lse, layout, scale, None, None)


def _seconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    found = do_bench(call, warmup=10, rep=50, return_mode="median")
    return float(found) / 1e3


if __name__ == "__main__":
    for size in (64, 128):
        tune(size, tell=print)
