"""Checks that the makers of masks share."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.ops.errors import InputError

MOST = 2**48  # positions add up to less than an int64 holds


def whole(mask: str, name: str, value: object, *, least: int) -> int:
    """`value` as an int of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(f"{mask}({name}={value!r}): expected an integer.")
    number = operator.index(value)
    if not least <= number <= MOST:
        raise InputError(f"{mask}({name}={number}): expected at least {least}, at most {MOST}.")
    return number


def whole_list(mask: str, name: str, values: Sequence[int] | Tensor) -> tuple[int, ...]:
    """`values` (a sequence or a 1-D integer tensor) as a tuple of ints."""
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.dtype == torch.bool:
            raise InputError(
                f"{mask}({name}): expected a 1-D integer tensor, got {values.dtype} of shape "
                f"{tuple(values.shape)}."
            )
        values = values.tolist()
    try:
        return tuple(whole(mask, name, v, least=0) for v in values)
    except TypeError as error:
        raise InputError(f"{mask}({name}={values!r}): expected a list of integers.") from error
