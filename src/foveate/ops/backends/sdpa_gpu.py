"""torch's fused attention on GPUs: cuDNN's on Hopper and later, else its flash operators.

`torch.nn.attention.activate_flash_attention_impl` puts FlashAttention 3 (Shah et al. 2024,
arXiv:2407.08608) or 4 in place of FlashAttention 2 behind the flash operators; what was activated
goes before cuDNN. On an H200 the Triton engine took 1.01 to 1.15 times as long as cuDNN 9 for dense
and causal calls forward, 1.2 to 1.3 times backward (bf16, `benchmarks/results/gpu`). The gradient
of cuDNN's queries isn't the same bit by bit in each run, so that deterministic mode does without
it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention
_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
_cudnn_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
_DTYPES = (torch.float16, torch.bfloat16)
_MAX_DIM = 256


@dataclass(frozen=True)
class Faster:
    """Plain calls for which an implementation is declared faster than the Triton engine."""

    implementation: str
    head_dims: tuple[int, ...]
    shortest: int


FASTER = (
    Faster("FA3", (64, 128, 256), 512),
    Faster("FA4", (64, 128), 512),
    Faster("cuDNN", (64, 128), 1024),
)


def implementation(device: torch.device | None = None) -> str:
    """What runs a plain call: FA3 or FA4 if it was activated, else cuDNN where it can, or FA2."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    found = (current() if current is not None else None) or "FA2"
    return "cuDNN" if found == "FA2" and _cudnn(device) else found


def _cudnn(device: torch.device | None) -> bool:
    """Whether cuDNN's attention is there, allowed, and declared faster than the engine here."""
    if device is None or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return False
    if not torch.backends.cuda.cudnn_sdp_enabled() or not torch.backends.cudnn.is_available():
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def _by_cudnn(query: Tensor, key: Tensor) -> bool:
    """Whether cuDNN runs a call: its lse is the flash operators' too, so either can go back.

    Only what is declared faster: of short sequences cuDNN refuses some, such as one key.
    """
    return implementation(query.device) == "cuDNN" and declared_faster(query, key)


def declared_faster(query: Tensor, key: Tensor) -> bool:
    """Whether `FASTER` names the implementation that would run, for this head size and lengths."""
    name, dim = implementation(query.device), query.shape[3]
    length = min(query.shape[2], key.shape[2])
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


def _aligned(x: Tensor) -> Tensor:
    """A tensor as these kernels read it: rows of contiguous numbers, all at steps of 16 bytes."""
    steps = (*x.stride()[:-1], x.storage_offset())
    even = x.stride(-1) == 1 and all(n * x.element_size() % 16 == 0 for n in steps)
    return x if even else x.clone(memory_format=torch.contiguous_format)


def forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and lse; as many heads of keys as of queries."""
    query, key, value = (_aligned(x) for x in (query, key, value))
    if _by_cudnn(query, key):
        out, lse, *_ = _cudnn_forward(
            query, key, value, None, True, 0.0, is_causal, False, scale=scale
        )
        return out, lse.reshape(query.shape[:3])
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
    query, key, value = (_aligned(x) for x in (query, key, value))
    if _by_cudnn(query, key):
        none = torch.zeros((), dtype=torch.int64, device=query.device)  # the dropout's state
        dq, dk, dv = _cudnn_backward(
            grad_out.contiguous(), query, key, value, out, lse[..., None], none, none, None, None,
            None, query.shape[2], key.shape[2], 0.0, is_causal, scale=scale,
        )  # fmt: skip
        return dq, dk, dv
    unused = torch.zeros(2, dtype=torch.int64, device=query.device)  # the dropout's state
    dq, dk, dv = _backward(
        grad_out, query, key, value, out, lse, None, None, query.shape[2], key.shape[2], 0.0,
        is_causal, unused, unused, scale=scale,
    )  # fmt: skip
    return dq, dk, dv
