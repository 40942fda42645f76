"""The Triton engine: exact attention over layouts on GPUs, fp32, bf16 and fp16.

Kernels run any layout without being compiled for it: lists, bit tiles, ranges and indices are data.
What they are compiled for is the head sizes, the dtype, the size of tiles and which kinds of lists
there are. On Hopper the forward over whole tiles and ranges has a kernel of its own, whose warps
are specialised (`run_hopper`). The backend `triton` of the core op stands on these functions;
Triton is imported when a kernel runs.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from foveate.ops.layout import Layout

__all__ = ["available", "backward", "forward", "interpreted", "reason", "supports"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIM = 1024
MAX_VALUE_DIM = 512
MAX_GRADIENT_DIM = 256
_OLDEST = (8, 0)
_EIGHT_BITS = (8, 9)  # compute capability from which there are instructions for them


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _has_eight_bits(device: torch.device) -> bool:
    """Whether a GPU has instructions for numbers of 8 bits, as NVIDIA lays them out."""
    return torch.version.hip is None and _capability(device) >= _EIGHT_BITS


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def reason() -> str:
    """Why the engine can't run on this machine; empty if it can."""
    if not _installed():
        return "triton is not installed; `pip install foveate[triton]` brings it (Linux)"
    if interpreted():
        return ""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < _OLDEST:
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU has compute capability {major}.{minor}; the kernels need 8.0"
    return ""


def available() -> bool:
    """Whether the engine can run on this machine."""
    return not reason()


def supports(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, needs_grad: bool
) -> list[str]:
    """Why the engine can't run this call; an empty list if it can."""
    reasons = []
    if query.dtype not in DTYPES:
        name = str(query.dtype).removeprefix("torch.")
        reasons.append(f"dtype {name} (it takes float32, bfloat16, float16)")
    on = "cpu" if interpreted() else "cuda"
    if any(x.device.type != on for x in (query, key, value)):
        more = ", under TRITON_INTERPRET=1" if interpreted() else ""
        reasons.append(f"device {query.device.type} (it runs on {on}{more})")
    elif reason():
        reasons.append(reason())
    elif on == "cuda" and key.dtype.itemsize == 1 and not _has_eight_bits(key.device):
        name = str(key.dtype).removeprefix("torch.")
        reasons.append(f"keys of {name} (they need NVIDIA's compute capability 8.9)")
    if query.shape[-1] > MAX_DIM:
        reasons.append(f"head size {query.shape[-1]} (it takes up to {MAX_DIM})")
    if value.shape[-1] > MAX_VALUE_DIM:
        reasons.append(f"value head size {value.shape[-1]} (it takes up to {MAX_VALUE_DIM})")
    largest = max(query.shape[-1], value.shape[-1])
    if needs_grad and key.dtype != query.dtype:
        reasons.append("a gradient with keys of another dtype than the queries'")
    if needs_grad and largest > MAX_GRADIENT_DIM:
        reasons.append(f"head size {largest} with a gradient (it takes up to {MAX_GRADIENT_DIM})")
    if bias is not None and bias.dtype not in (*DTYPES, torch.float64):
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
        key: (B, Hkv, Lkv, D); keys and values may be float8_e4m3fn or float8_e5m2, which are
            widened to the queries' dtype on the chip.
        value: (B, Hkv, Lkv, Dv); a slice of the keys' storage is read once for both.
        layout: the tiles to visit; None is everything.
        scale: factor on the scores.
        softcap: c in c * tanh(score / c), before bias and mask; None is none.
        bias: 4-D, broadcastable to (B, Hq, Lq, Lkv), added to the scores.
        bias_first: the bias is a relative one, (.., .., 1 or Lq, R), this the distance of its first
            entry; see `foveate.ops.bias`.

    Returns:
        out (B, Hq, Lq, Dv), lse (B, Hq, Lq) fp32 natural log; out 0 and lse -inf for empty rows.
    """
    from foveate.ops.triton import run_forward as host

    return host.run(query, key, value, layout, scale, softcap, bias, bias_first)


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

    The same bits every time: sums are taken in a fixed order, a shared bias's in fixed point.

    Args:
        grad_out: (B, Hq, Lq, Dv).
        grad_lse: (B, Hq, Lq).
        query, key, value, layout, scale, softcap, bias, bias_first: as in `forward`.
        out, lse: what `forward` gave.

    Returns:
        Gradients of query, key, value, and of the bias in its shape (None without one).
    """
    from foveate.ops.triton import run_backward as host

    return host.run(
        grad_out, grad_lse, query, key, value, out, lse, layout, scale, softcap, bias, bias_first
    )
