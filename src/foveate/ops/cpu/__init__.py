"""The C++ engine: exact attention over layouts on CPUs, fp32, bf16 and fp16.

Query rows lie in the vector lanes, keys and values are read where they are, and one parallel region
serves a call; csrc/ holds the kernels, compiled for several instruction sets and chosen when the
library is loaded: plain C++, AVX2, AVX-512, that with products of bf16 pairs, and AMX, whose tiles
multiply bf16. The backend `cpu` of the core op stands on these functions.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.ops.cpu import binding
from foveate.ops.cpu.binding import Call, isa, use

if TYPE_CHECKING:
    from foveate.ops.layout import Layout

__all__ = ["available", "backward", "forward", "isa", "notify", "reason", "supports", "use"]

MAX_DIM = 1024


def available() -> bool:
    """Whether the engine is there."""
    return binding.load()[0] is not None


def reason() -> str:
    """Why the engine is not there; empty if it is."""
    return binding.load()[1]


@cache
def notify() -> None:
    """Say once that the engine is not there and what serves in its place."""
    if not available() and not binding.switched_off():
        warnings.warn(
            f"{reason()}. Attention on the CPU runs in pure torch until then, which is slower.",
            stacklevel=2,
        )


def supports(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout | None, bias: Tensor | None
) -> list[str]:
    """Why the engine can't run this call; an empty list if it can."""
    reasons = []
    if not available():
        reasons.append(reason())
    if query.dtype not in binding.DTYPES:
        name = str(query.dtype).removeprefix("torch.")
        reasons.append(f"dtype {name} (it takes float32, bfloat16, float16)")
    if not (query.is_cpu and key.is_cpu and value.is_cpu):
        reasons.append(f"device {query.device.type} (it runs on cpu)")
    largest = max(query.shape[3], value.shape[3])
    if largest > MAX_DIM:
        reasons.append(f"head size {largest} (it takes up to {MAX_DIM})")
    if bias is not None and bias.dtype not in (*binding.DTYPES, torch.float64):
        reasons.append(f"bias of dtype {bias.dtype}")
    return reasons


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    bias_first: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp.

    Args:
        query: (B, Hq, Lq, D), fp32, bf16 or fp16.
        key: (B, Hkv, Lkv, D).
        value: (B, Hkv, Lkv, Dv).
        layout: the tiles to visit; None is everything.
        scale: factor on the scores.
        softcap: c in c * tanh(score / c), before bias and mask; None is none.
        bias: 4-D, broadcastable to (B, Hq, Lq, Lkv), added to the scores.
        bias_first: the bias is a relative one, (.., .., 1 or Lq, R), this the distance of its first
            entry; see `foveate.ops.bias`.

    Returns:
        out (B, Hq, Lq, Dv), lse (B, Hq, Lq) fp32 natural log; out 0 and lse -inf for empty rows.
    """
    batch, heads, length, _ = query.shape
    out = query.new_empty((batch, heads, length, value.shape[3]))
    lse = query.new_empty((batch, heads, length), dtype=torch.float32)
    if 0 in (batch, heads, length):
        return out, lse
    call, kept = _call(query, key, value, out, lse, layout, scale, softcap, bias, bias_first)
    binding.run("foveate_forward", call)
    del kept
    return out, lse


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    bias_first: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of a loss whose gradients at `out` and `lse` are given (None is zero).

    dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O) + dlse), dQ = scale dS K, dK = scale dS^T Q;
    deterministic for a given number of threads.

    Args:
        grad_out: (B, Hq, Lq, Dv).
        grad_lse: (B, Hq, Lq).
        query, key, value, layout, scale, softcap, bias, bias_first: as in `forward`.
        out, lse: what `forward` gave.

    Returns:
        Gradients of query, key, value, and of the bias in its shape (None without one).
    """
    dq, dk, dv = (x.new_empty(x.shape) for x in (query, key, value))
    dbias = None if bias is None else bias.new_zeros(bias.shape, dtype=torch.float32)
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        dq, dk, dv = dq.zero_(), dk.zero_(), dv.zero_()
        return dq, dk, dv, None if dbias is None or bias is None else dbias.to(bias.dtype)
    out, lse = _rows(out), lse.contiguous()
    call, kept = _call(query, key, value, out, lse, layout, scale, softcap, bias, bias_first)
    if grad_out is not None:
        grad_out = _rows(grad_out.to(query.dtype))  # an expanded one, as of a sum, has strides of 0
        kept.append(grad_out)
        call.grad_out = binding.rows(grad_out)
    if grad_lse is not None:
        grad_lse = grad_lse.float().contiguous()
        kept.append(grad_lse)
        call.grad_lse = grad_lse.data_ptr()
    call.grad_query, call.grad_key = binding.rows(dq), binding.rows(dk)
    call.grad_value = binding.rows(dv)
    if dbias is not None:
        call.grad_bias = dbias.data_ptr()
        call.gbias_b, call.gbias_h, call.gbias_q, call.gbias_k = (
            stride if size > 1 else 0 for stride, size in zip(dbias.stride(), dbias.shape)
        )
    binding.run("foveate_backward", call)
    del kept
    return dq, dk, dv, None if dbias is None or bias is None else dbias.to(bias.dtype)


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    bias_first: int | None = None,
) -> tuple[Call, list[Tensor]]:
    """The call's description, and the tensors that must outlive it."""
    query, key, value = _rows(query), _rows(key), _rows(value)
    kept = [query, key, value, out, lse]
    call = binding.described(query, key, value, out, lse, scale, softcap or 0.0)
    if bias is not None:
        bias = bias.detach().float() if bias.dtype == torch.float64 else bias
        kept.append(bias)
        call.bias = bias.data_ptr()
        call.bias_dtype = binding.DTYPES[bias.dtype]
        call.bias_b, call.bias_h, call.bias_q, call.bias_k = (
            stride if size > 1 else 0 for stride, size in zip(bias.stride(), bias.shape)
        )
        if bias_first is not None:
            call.bias_first, call.bias_count = bias_first, bias.shape[3]
    if layout is not None:
        _describe(call, layout, kept)
    return call, kept


def _rows(x: Tensor) -> Tensor:
    """With a contiguous last axis, which is all that the engine asks of strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _describe(call: Call, layout: Layout, kept: list[Tensor]) -> None:
    ptr, cols, kinds, bits = (
        x.contiguous() for x in (layout.ptr, layout.cols, layout.kinds, layout.bits)
    )
    gathered = None if layout.gathered is None else layout.gathered.contiguous()
    kept += [ptr, cols, kinds, bits]
    call.q_tile, call.kv_tile = layout.q_tile, layout.kv_tile
    call.q_tiles, call.kv_tiles = ptr.shape[2] - 1, layout.kv_tiles
    call.groups_b, call.groups_h = ptr.shape[0], ptr.shape[1]
    call.entries, call.patterns = cols.shape[0], bits.shape[0]
    call.ptr, call.cols, call.kinds = ptr.data_ptr(), cols.data_ptr(), kinds.data_ptr()
    call.bits = bits.data_ptr()
    if gathered is not None:
        kept.append(gathered)
        call.lists, call.gathered = gathered.shape[0], gathered.data_ptr()
    for name in ("q_index", "kv_index", "key_range", "row_range"):
        listed = getattr(layout, name)
        if listed is not None:
            setattr(call, name, binding.table(listed, kept))
