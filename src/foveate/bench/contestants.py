"""Who takes part: foveate's backends, torch's SDPA, and compiled FlexAttention."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.bench.case import Case, Declined
from foveate.bench.correct import Call
from foveate.bench.flexmask import block_mask
from foveate.ops import Layout, attention
from foveate.ops.dispatch import BACKENDS

_MASK_ELEMENTS = 1 << 26


@dataclass
class Contestant:
    """One way to compute a cell: its call, and what is known of it beside its speed."""

    name: str
    call: Call
    facts: dict[str, Any] = field(default_factory=dict)


def known() -> list[str]:
    """Names that can take part: SDPA, FlexAttention, and foveate's own backends."""
    return ["sdpa", "flex", *own()]


def own() -> list[str]:
    """The backends of foveate itself that run on a CPU."""
    return [name for name in BACKENDS if name not in ("sdpa", "flex", "triton")]


def contestant(
    name: str, case: Case, layout: Layout, tensors: tuple[Tensor, Tensor, Tensor]
) -> Contestant:
    """Make a contestant ready for a case.

    Raises:
        Declined: it doesn't do such a case.
    """
    if name == "sdpa":
        return _sdpa(case, tensors)
    if name == "flex":
        return _flex(case, layout, tensors)
    if case.dense:
        return Contestant(name, lambda q, k, v: attention(q, k, v, backend=name))
    return Contestant(name, lambda q, k, v: attention(q, k, v, layout=layout, backend=name))


def _sdpa(case: Case, tensors: tuple[Tensor, Tensor, Tensor]) -> Contestant:
    """The scaled_dot_product_attention of torch; other masks than causal as an additive tensor."""
    query, key, _ = tensors
    shared = query.shape[1] != key.shape[1]
    extra: Tensor | None = None
    facts: dict[str, Any] = {}
    if not case.dense and not case.causal:
        every = torch.arange(case.length)
        if case.length**2 > _MASK_ELEMENTS:
            raise Declined(f"its mask would hold {case.length} x {case.length} elements")
        start = time.perf_counter()
        allowed = case.allowed(every)
        if allowed.shape[1] > 1:
            allowed = allowed.repeat_interleave(query.shape[1] // allowed.shape[1], 1)
        extra = torch.zeros(allowed.shape, dtype=query.dtype).masked_fill_(~allowed, -torch.inf)
        facts["mask_seconds"] = time.perf_counter() - start

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=extra, is_causal=case.causal, enable_gqa=shared
        )
        return out, None

    return Contestant("sdpa", call, facts)


def _flex(case: Case, layout: Layout, tensors: tuple[Tensor, Tensor, Tensor]) -> Contestant:
    """FlexAttention, compiled for this mask and shape; the time that takes is a fact."""
    from torch.nn.attention.flex_attention import flex_attention

    query, key, _ = tensors
    shared = query.shape[1] != key.shape[1]
    heads = query.shape[1] if layout.groups[1] > 1 else 1
    if layout.groups[1] not in (1, heads):
        raise Declined("heads share lists in groups; a BlockMask has one, or one for each head")
    start = time.perf_counter()
    lists = None if case.dense else block_mask(case, layout)
    facts: dict[str, Any] = {"block_mask_seconds": time.perf_counter() - start}
    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return compiled(q, k, v, block_mask=lists, enable_gqa=shared), None  # no lse on the CPU

    start = time.perf_counter()
    with torch.no_grad():
        call(*tensors)
    facts["compile_seconds"] = time.perf_counter() - start
    return Contestant("flex", call, facts)
