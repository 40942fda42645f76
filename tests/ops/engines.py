"""What the tests of all engines share: tensors, layouts made by hand, and comparing with float64.

An engine is a module with `forward` and `backward`, such as `foveate.ops.cpu`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from oracle import attend, by_distance
from torch import Tensor

from foveate.ops import Layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(
    shape: tuple[int, int, int, int, int, int, int], dtype: torch.dtype, strided: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value for (B, Hq, Hkv, Lq, Lkv, D, Dv), as (B, L, H, D) memory if `strided`."""
    batch, heads, kv_heads, q_len, kv_len, dim, value_dim = shape

    def one(h: int, n: int, d: int) -> Tensor:
        if strided:
            return torch.randn(batch, n, h, d + 3).to(dtype)[..., 1 : d + 1].transpose(1, 2)
        return torch.randn(batch, h, n, d).to(dtype)

    return one(heads, q_len, dim), one(kv_heads, kv_len, dim), one(kv_heads, kv_len, value_dim)


def compare(
    engine: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Any,
    allowed: Tensor | None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    bias_first: int | None = None,
) -> None:
    """An engine's forward against float64; `allowed` is bool (B or 1, H or 1, Lq, Lkv)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = engine.forward(q, k, v, layout, scale, softcap, bias, bias_first)
    if allowed is None:
        allowed = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)
    if allowed.shape[1] > 1:
        allowed = allowed.repeat_interleave(q.shape[1] // allowed.shape[1], 1)
    if bias is not None and bias_first is not None:
        bias = by_distance(bias, bias_first, q.shape[2], k.shape[2])
    want, want_lse = attend(q, k, v, allowed, scale=scale, softcap=softcap, bias=bias)
    # Rounding of the inputs' dtype, on values of size about 3; fp32 sums err by a few ulp more, and
    # a score's own rounding shows in its weight.
    unit = torch.finfo(q.dtype).eps
    size = v.double().abs().amax().item() if v.numel() else 1.0
    size *= sharpness(q, k, scale)
    tolerance = (1.2 if unit > 1e-5 else 16) * unit * size
    torch.testing.assert_close(out.double(), want, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=2e-5)


def compare_gradients(
    engine: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Any,
    allowed: Tensor | None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    grads: tuple[bool, bool] = (True, True),
    scale: float | None = None,
    bias_first: int | None = None,
) -> None:
    """An engine's gradients against autograd through attention in float64."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = engine.forward(q, k, v, layout, scale, softcap, bias, bias_first)
    given = [x for x in (q, k, v, bias) if x is not None]
    wide = [x.detach().double().requires_grad_() for x in given]
    if allowed is None:
        allowed = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)
    if allowed.shape[1] > 1:
        allowed = allowed.repeat_interleave(q.shape[1] // allowed.shape[1], 1)
    b = None if bias is None else wide[3]
    if b is not None and bias_first is not None:
        b = by_distance(b, bias_first, q.shape[2], k.shape[2])
    want, want_lse = attend(*wide[:3], allowed, scale=scale, softcap=softcap, bias=b)
    do = torch.randn(out.shape).to(q.dtype) if grads[0] else None
    dlse = torch.randn(lse.shape) if grads[1] else None
    loss = want.sum() * 0 + want_lse.masked_fill(want_lse == -torch.inf, 0).sum() * 0
    if do is not None:
        loss = loss + (want * do.double()).sum()
        # An engine has `out` as it was put out: e = do . (exact - rounded) enters each ds as p e,
        # which is what a gradient e at lse does.
        e = ((want.detach() - out.double()) * do.double()).sum(-1)
        loss = loss + (want_lse * e).masked_fill(want_lse == -torch.inf, 0).sum()
    if dlse is not None:
        loss = loss + (want_lse * dlse.double()).masked_fill(want_lse == -torch.inf, 0).sum()
    right = torch.autograd.grad(loss, wide)
    found = engine.backward(do, dlse, q, k, v, out, lse, layout, scale, softcap, bias, bias_first)
    unit = torch.finfo(q.dtype).eps * sharpness(q, k, scale)
    for name, got, x, good in zip(("q", "k", "v", "bias"), found, given, right):
        assert got is not None
        assert got.dtype == x.dtype, name
        assert got.shape == x.shape, name
        # Rounding relative to the largest gradient; sums over many pairs carry more of it.
        size = max(good.abs().max().item(), 0.1) * max(1.0, (q.shape[2] * k.shape[2]) ** 0.25 / 4)
        size *= (x.numel() and out.numel() / x.numel()) ** 0.5 if name == "bias" else 1.0
        tolerance = (4 if torch.finfo(q.dtype).eps > 1e-5 else 40) * unit * max(1.0, size)
        # A bias may be coarser than the queries, and its gradient is rounded to its dtype.
        tolerance += torch.finfo(x.dtype).eps * good.abs().max().item() if x.dtype != q.dtype else 0
        if name != "v":
            tolerance = max(tolerance, 8 * unit * cancelled(name, x, q, k, v, do, scale))
        torch.testing.assert_close(
            got.double(), good, rtol=0, atol=tolerance, msg=partial("d{}: {}".format, name)
        )


def cancelled(
    name: str, x: Tensor, q: Tensor, k: Tensor, v: Tensor, do: Tensor | None, scale: float
) -> float:
    """What rounding leaves of the gradient of x that cancels (not of values), in units of eps.

    With one key p is 1 and do . v - delta cancels, but both are rounded; the pairs' parts add up as
    independent ones do. With n keys p is 1 / n, and it soon is nothing beside the other parts.
    """
    if do is None or not k.numel() or not v.numel() or not x.numel():
        return 0.0
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    pairs = {"q": k.shape[2], "k": rows / (k.shape[0] * k.shape[1])}.get(
        name, rows * k.shape[2] / x.numel()
    )
    size = (2 * v.shape[3] * pairs) ** 0.5 / k.shape[2]
    factors = [do, v]
    if name != "bias":
        size *= abs(scale)
        factors.append(k if name == "q" else q)
    for factor in factors:
        size *= factor.double().square().mean().sqrt().item()
    return size


def sharpness(q: Tensor, k: Tensor, scale: float) -> float:
    """How much larger than usual the scores may be, at least 1."""
    norms = [x.double().norm(dim=-1).amax().item() if x.numel() else 0.0 for x in (q, k)]
    return max(1.0, abs(scale) * norms[0] * norms[1] / 16)


SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (1, 2, 2, 64, 64, 64, 64),
    (2, 4, 2, 100, 131, 37, 53),
    (1, 8, 1, 1, 300, 128, 64),
    (1, 6, 3, 200, 77, 16, 256),
    (2, 3, 1, 17, 515, 8, 5),
]


def every_tile(q_len: int, kv_len: int, tile: int, kind: int) -> Layout:
    """A layout that visits all tiles, every one of this kind."""
    rows, cols = -(-q_len // tile), -(-kv_len // tile)
    return Layout(
        q_len,
        kv_len,
        tile,
        tile,
        torch.arange(0, rows * cols + 1, cols).reshape(1, 1, -1),
        torch.arange(cols, dtype=torch.int32).repeat(rows),
        torch.full((rows * cols,), kind, dtype=torch.int32),
        torch.zeros(0, tile, tile // 8, dtype=torch.uint8),
    )


def for_groups(layout: Layout, batches: int, heads: int) -> Layout:
    """The lists of a layout once more for each batch entry and head."""
    copies, n = batches * heads, layout.cols.numel()
    return replace(
        layout,
        ptr=torch.cat([layout.ptr + i * n for i in range(copies)]).reshape(batches, heads, -1),
        cols=layout.cols.repeat(copies),
        kinds=layout.kinds.repeat(copies),
    )
