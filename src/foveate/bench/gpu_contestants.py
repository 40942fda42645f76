"""Who takes part on a GPU: the engine, SDPA's kernels, FlexAttention, FlashAttention 3 and 4."""

from __future__ import annotations

import importlib
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from foveate.bench.case import Case, Declined
from foveate.bench.contestants import Contestant
from foveate.bench.flexmask import block_mask
from foveate.ops import Layout, attention

SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}
PACKAGES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}
NAMES = ("triton", *SDPA, "flex", *PACKAGES)
DENSE = ("triton", *SDPA, *PACKAGES)  # who may be the fastest on a dense call


def installed() -> tuple[str, ...]:
    """Those of `NAMES` whose package is there."""
    return tuple(name for name in NAMES if name not in PACKAGES or _package(name) is not None)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError:
        return None


def contestant(name: str, case: Case, layout: Layout, shared: bool) -> Contestant:
    """Make a contestant ready.

    Args:
        name: of `NAMES`.
        case: the pattern.
        layout: the same, on the GPU.
        shared: whether several query heads share a key head.

    Raises:
        Declined: it doesn't do such a case.
    """
    if name == "triton":
        whole = None if case.dense else layout
        return Contestant(name, lambda q, k, v: attention(q, k, v, layout=whole, backend=name))
    if name == "flex":
        return _flex(case, layout, shared)
    if not case.dense and not case.causal:
        raise Declined("dense and causal only")
    if name in SDPA:

        def torch_call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
            with sdpa_kernel(SDPA[name]):
                out = scaled_dot_product_attention(
                    q, k, v, is_causal=case.causal, enable_gqa=shared
                )
            return out, None

        return Contestant(name, torch_call)
    package = _package(name)
    if package is None:
        raise Declined(f"{PACKAGES[name]} is not installed")

    def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        out = package.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=case.causal)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2), None

    return Contestant(name, flash)


def _flex(case: Case, layout: Layout, shared: bool) -> Contestant:
    """FlexAttention compiled for this mask and shape."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    lists, facts = None, {}
    if not case.dense:
        start = time.perf_counter()
        found = block_mask(case, layout.to("cpu"))
        moved: list[Any] = [
            None if x is None else x.to(layout.device)
            for x in (
                found.kv_num_blocks, found.kv_indices, found.full_kv_num_blocks,
                found.full_kv_indices,
            )
        ]  # fmt: skip
        lists = BlockMask.from_kv_blocks(
            moved[0],
            moved[1],
            moved[2],
            moved[3],
            BLOCK_SIZE=found.BLOCK_SIZE,
            mask_mod=on_device(found.mask_mod, layout.device),
            seq_lengths=found.seq_lengths,
        )
        facts["block_mask_seconds"] = time.perf_counter() - start
    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return compiled(q, k, v, block_mask=lists, enable_gqa=shared), None

    return Contestant("flex", call, facts)


def on_device(x: Any, device: torch.device) -> Any:
    """A function of indices whose tensors, those that it closes over, are on another device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, list | tuple):
        return type(x)(on_device(y, device) for y in x)
    if not isinstance(x, types.FunctionType) or x.__closure__ is None:
        return x
    cells = tuple(types.CellType(on_device(c.cell_contents, device)) for c in x.__closure__)
    return types.FunctionType(x.__code__, x.__globals__, x.__name__, x.__defaults__, cells)
