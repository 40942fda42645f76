"""torch's flash attention on GPUs: FlashAttention 2, or 3 and 4 where torch's registry runs them.

`torch.nn.attention.activate_flash_attention_impl` puts FlashAttention 3 (Shah et al. 2024,
arXiv:2407.08608) or 4 in place of the kernels behind the operators that are called here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention
_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
_DTYPES = (torch.float16, torch.bfloat16)
_MAX_DIM = 256


@dataclass(frozen=True)
class Faster:
    """Plain calls for which an implementation is declared faster than the Triton engine."""

    implementation: str
    head_dims: tuple[int, ...]
    shortest: int


FASTER = (Faster("FA3", (64, 128, 256), 512), Faster("FA4", (64, 128), 512))


def implementation() -> str:
    """What runs behind torch's flash operators: FA2, or what was activated in its place."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return (current() if current is not None else None) or "FA2"


def declared_faster(query: Tensor) -> bool:
    """Whether `FASTER` names the implementation that would run, for this head size and length."""
    name, dim, length = implementation(), query.shape[3], query.shape[2]
    return any(
        f.implementation == name and dim in f.head_dims and length >= f.shortest for f in FASTER
    )


def reasons(query: Tensor, plain: bool) -> list[str]:
    """Why torch's flash operators can't run a call on a GPU."""
    found = []
    if query.dtype not in _DTYPES:
        name = str(query.dtype).removeprefix("torch.")
        found.append(f"dtype {name} (on a GPU it takes float16, bfloat16)")
    if not plain:
        found.append("on a GPU it takes dense and causal calls only")
    if query.shape[3] % 8 or query.shape[3] > _MAX_DIM:
        found.append(
            f"head size {query.shape[3]} (on a GPU it takes multiples of 8 up to {_MAX_DIM})"
        )
    return found


def forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and lse; as many heads of keys as of queries."""
    out, lse, *_ = _forward(query, key, value, 0.0, is_causal, False, scale=scale)
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    unused = torch.zeros(2, dtype=torch.int64, device=query.device)  # the dropout's state
    dq, dk, dv = _backward(
        grad_out, query, key, value, out, lse, None, None, query.shape[2], key.shape[2], 0.0,
        is_causal, unused, unused, scale=scale,
    )  # fmt: skip
    return dq, dk, dv
