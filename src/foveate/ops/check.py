"""Refuse bad input before any work, and say what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.ops.bias import RelativeBias
from foveate.ops.errors import InputError
from foveate.ops.layout import Layout
from foveate.ops.masks import Mask, blocks
from foveate.ops.types import EIGHT_BITS

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES = (*_FLOATS, *EIGHT_BITS)


def check_tensors(query: Tensor, key: Tensor, value: Tensor, narrow: bool = False) -> None:
    """Shapes, dtypes and devices of query, key and value.

    narrow: whether keys and values may have 8 bits beside wider queries.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise InputError(f"{name} must be a tensor, got {type(x).__name__}.")
        if x.dim() != 4:
            raise InputError(
                f"{name} must be (batch, heads, length, head size), got shape {tuple(x.shape)}."
            )
        if x.dtype not in _DTYPES:
            raise InputError(f"{name} has dtype {x.dtype}; expected a floating-point dtype.")
    _check_dtypes(query, key, value, narrow)
    if not (query.device == key.device == value.device):
        raise InputError(
            "query, key and value must be on one device, got "
            f"{query.device}, {key.device} and {value.device}; move them together."
        )
    (batch, heads, _, dim), keys, values = query.shape, key.shape, value.shape
    if not (batch == keys[0] == values[0]):
        raise InputError(f"Batch sizes differ: query {batch}, key {keys[0]}, value {values[0]}.")
    if keys[1] != values[1] or keys[2] != values[2]:
        raise InputError(
            "key and value must have the same heads and length, got "
            f"{tuple(keys)} and {tuple(values)}."
        )
    if dim != keys[3]:
        raise InputError(f"Head sizes differ: query {dim}, key {keys[3]}.")
    if keys[1] == 0 or heads % keys[1]:
        raise InputError(f"{heads} query heads are not a multiple of {keys[1]} key/value heads.")


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor, narrow: bool) -> None:
    if query.dtype == key.dtype == value.dtype and query.dtype in _FLOATS:
        return
    found = f"{query.dtype}, {key.dtype} and {value.dtype}"
    if not any(x.dtype in EIGHT_BITS for x in (query, key, value)):
        raise InputError(
            f"query, key and value must have one dtype, got {found}; convert them to the same."
        )
    wider = (torch.float16, torch.bfloat16, torch.float32)
    if not narrow:
        raise InputError(
            f"query, key and value are {found}: 8 bits are for the keys and values of "
            "foveate.attention alone; convert them to a wider dtype."
        )
    if query.dtype not in wider or key.dtype != value.dtype:
        raise InputError(
            f"query, key and value are {found}: of 8 bits may be keys and values together, beside "
            "queries of float16, bfloat16 or float32."
        )
    if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
        raise InputError(
            f"A gradient of keys or values of {key.dtype} would be rounded to 8 bits; convert them "
            "to a wider dtype, or detach them."
        )


def check_mask(mask: Mask | Tensor | None, layout: Layout | None) -> Mask | None:
    """One of mask and layout at most; a boolean tensor becomes `blocks(tensor, 1)`."""
    if mask is not None and layout is not None:
        raise InputError("Give a mask or a layout, not both; a layout already holds its mask.")
    if layout is not None and not isinstance(layout, Layout):
        raise InputError(f"layout must be a foveate.Layout, got {type(layout).__name__}.")
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise InputError(
                f"A mask tensor must be boolean with True = attend, got {mask.dtype}; "
                "for additive scores use bias=."
            )
        return blocks(mask, 1)
    if mask is not None and not isinstance(mask, Mask):
        raise InputError(
            f"mask must be a foveate mask such as causal(), or a boolean tensor; got "
            f"{type(mask).__name__}."
        )
    return mask


def check_numbers(scale: float, softcap: float | None, dropout: float) -> None:
    """scale, softcap and dropout in their ranges."""
    for name, x in (("scale", scale), ("softcap", softcap or 1.0), ("dropout", dropout)):
        if isinstance(x, str | Tensor):
            raise InputError(f"{name} must be a number, got {type(x).__name__}.")
    if not -math.inf < scale < math.inf:
        raise InputError(f"scale={scale}: expected a finite number.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise InputError(f"softcap={softcap}: expected a positive number, or None.")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout={dropout}: expected a probability, 0 up to but not 1.")


def check_sinks(sink_logits: Tensor, query: Tensor) -> None:
    """One sink logit for each query head."""
    if tuple(sink_logits.shape) != (query.shape[1],):
        raise InputError(
            f"sink_logits must be ({query.shape[1]},), one for each query head, got "
            f"{tuple(sink_logits.shape)}."
        )
    if sink_logits.device != query.device:
        raise InputError(f"sink_logits is on {sink_logits.device}, query on {query.device}.")


def check_bias(
    bias: Tensor | RelativeBias, query: Tensor, key: Tensor
) -> tuple[Tensor, int | None]:
    """A bias as 4-D, broadcastable to (B, Hq, Lq, Lkv); or a relative one's table and `first`."""
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    first = None
    if isinstance(bias, RelativeBias):
        first, bias = bias.first, bias.four()
        full = (*full[:3], bias.shape[3])
    if not isinstance(bias, Tensor):
        raise InputError(f"bias must be a tensor or a RelativeBias, got {type(bias).__name__}.")
    if bias.dim() > 4 or any(a not in (1, b) for a, b in zip(reversed(bias.shape), reversed(full))):
        raise InputError(f"bias of shape {tuple(bias.shape)} does not broadcast to {full}.")
    if bias.device != query.device:
        raise InputError(f"bias is on {bias.device}, query on {query.device}.")
    if not bias.is_floating_point():
        raise InputError(f"bias must be floating-point, got {bias.dtype}; a mask goes in mask=.")
    return bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape)), first
