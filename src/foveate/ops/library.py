"""The core op as a torch operator: one for the forward, one for the backward.

Masks travel as their expression and the tensors that it names, layouts as their lists, so that
tracing never looks inside: `torch.compile(fullgraph=True)` sees one opaque call, whose layout is
resolved when it runs. Kernels are looked up then, too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from foveate.ops.backends.base import Inputs, lse_dtype
from foveate.ops.dispatch import choose
from foveate.ops.layout import Layout
from foveate.ops.masks import Mask, parse_mask

_CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, str mask, Tensor[] mask_tensors, "
    "Tensor?[] layout, int[] layout_sizes, float scale, float? softcap, "
    "SymInt? bias_first, str backend"
)
_LISTS = (
    "ptr",
    "cols",
    "kinds",
    "bits",
    "gathered",
    "q_index",
    "kv_index",
    "key_range",
    "row_range",
)
_library = torch.library.Library("foveate", "DEF")
_library.define(f"attention({_CALL}) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_CALL}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_ONCE = "this backend gives first derivatives only; for second ones use backend='reference'"
_layouts: WeakValueDictionary[int, Layout] = WeakValueDictionary()


def pack(
    mask: Mask | None, layout: Layout | None
) -> tuple[str, list[Tensor], list[Any], list[int]]:
    """(mask expression, its tensors, layout lists, layout sizes) as the operator takes them."""
    if layout is not None:
        sizes = [layout.q_len, layout.kv_len, layout.q_tile, layout.kv_tile]
        if not torch.compiler.is_compiling():
            _layouts[id(layout.ptr)] = layout
        return "", [], [getattr(layout, name) for name in _LISTS], sizes
    if mask is not None:
        return mask.spec, list(mask.tensors), [], []
    return "", [], [], []


@lru_cache(maxsize=256)
def _parsed(spec: str) -> Mask:
    return parse_mask(spec)


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    spec: str,
    tensors: list[Tensor],
    lists: list[Tensor | None],
    sizes: list[int],
    scale: float,
    softcap: float | None,
    bias_first: int | None,
) -> Inputs:
    mask = None
    if spec:
        mask = parse_mask(spec, tensors) if tensors else _parsed(spec)
    layout = None
    if lists:
        # The very object, if it still lives, keeps what was derived from it.
        layout = _layouts.get(id(lists[0]))
        if layout is None or any(getattr(layout, n) is not x for n, x in zip(_LISTS, lists)):
            layout = Layout(*sizes, *lists)  # type: ignore[arg-type]
        layout = layout.checked()
    return Inputs(query, key, value, mask, layout, bias, scale, softcap, bias_first=bias_first)


def pairs(*call: Any) -> float:
    """Pairs that attend in a call of the operator, mean over batch entries and heads."""
    inputs = _inputs(*call[:-1])
    if inputs.layout is not None:
        return inputs.layout.pairs
    lengths = (inputs.query.shape[2], inputs.key.shape[2])
    return (
        float(lengths[0] * lengths[1])
        if inputs.mask is None
        else (inputs.mask.pairs(*lengths) / math.prod(inputs.mask.groups()))
    )


def _forward(*call: Any) -> tuple[Tensor, Tensor]:
    inputs = _inputs(*call[:-1])
    out, lse = choose(inputs, call[-1]).forward(inputs)
    return out.contiguous(), lse.contiguous()


def _forward_fake(*call: Any) -> tuple[Tensor, Tensor]:
    query, value = call[0], call[2]
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    return out, query.new_empty(query.shape[:3], dtype=lse_dtype(query.dtype))


def _backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *call: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from foveate.ops.types import AttentionOutput

    inputs = _inputs(*call[:-1])
    backend = choose(replace(inputs, needs_grad=True), call[-1])
    got = backend.backward_pass(inputs, AttentionOutput(out, lse), grad_out, grad_lse)
    dbias = call[0].new_empty(0) if got.bias is None else got.bias.contiguous()
    return got.query.contiguous(), got.key.contiguous(), got.value.contiguous(), dbias


def _backward_fake(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *call: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value, bias = call[:4]
    dbias = query.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        dbias,
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.foveate.attention(*call)
        query, key, value, bias, spec, tensors, lists, *rest = call
        ctx.counts = (len(tensors), len(lists))
        ctx.rest = (spec, rest)
        ctx.save_for_backward(query, key, value, bias, out, lse, *tensors, *lists)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        query, key, value, bias, out, lse, *others = ctx.saved_tensors
        tensors, lists = others[: ctx.counts[0]], others[ctx.counts[0] :]
        spec, rest = ctx.rest
        with torch.no_grad():
            grads = torch.ops.foveate.attention_backward(
                grad_out, grad_lse, out, lse, query, key, value, bias, spec, tensors, lists, *rest
            )
        if torch.is_grad_enabled():  # asked for by create_graph: say so if it is ever used
            grads = torch._C._functions.DelayedError(_ONCE, 4)(*(g.requires_grad_() for g in grads))
        dq, dk, dv, dbias = grads
        return dq, dk, dv, (None if bias is None else dbias), *(None for _ in range(8))


def _autograd(*call: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call[:4]):
        return _Attention.apply(*call)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.foveate.attention(*call)


_library.impl("attention", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_library.impl("attention", _autograd, "Autograd")
torch.library.register_fake("foveate::attention", _forward_fake, lib=_library)
torch.library.register_fake("foveate::attention_backward", _backward_fake, lib=_library)
