"""Reading transformers' mask functions: closures of a few known kinds become foveate masks.

`mask_function(b, h, q, kv)` is opaque, but masking_utils builds it from a handful of pieces. Each
is recognised by its name and by the variables it closes over; whatever isn't exactly as expected
(another version of transformers, a function of the user's) is left to be evaluated as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.ops import Mask, causal, window

_MODULE = "transformers.masking_utils"


class Rule(NamedTuple):
    """What a mask function says.

    mask: the rule on positions; None is everything.
    causal: no query sees a key behind it, so that what a static cache hasn't filled is hidden.
    documents: (B, L) int, the packed sequence that each token belongs to; None if not packed.
    chunk_starts: (B,) int, where the function counts its chunks from; None if it has none.
    """

    mask: Mask | None
    causal: bool
    documents: Tensor | None = None
    chunk_starts: Tensor | None = None


EVERYTHING = Rule(None, False)


def recognise(function: Callable[..., Any]) -> Rule | None:
    """The rule of a mask function of transformers, or None if it isn't known."""
    if getattr(function, "__module__", None) != _MODULE:
        return None
    name, held = function.__qualname__, _closure(function)
    if name == "causal_mask_function":
        return Rule(causal(), True)
    if name == "bidirectional_mask_function":
        return EVERYTHING
    if name == "and_masks.<locals>.and_mask" and set(held) == {"mask_functions"}:
        return _all_of(held["mask_functions"])
    if name == "sliding_window_overlay.<locals>.inner_mask" and set(held) == {"sliding_window"}:
        return Rule(window(int(held["sliding_window"]) - 1, -1), False)
    if name == "sliding_window_bidirectional_overlay.<locals>.inner_mask" and set(held) == {
        "sliding_window"
    }:
        size = int(held["sliding_window"])
        return Rule(window(size, size), False)
    if name == "chunked_overlay.<locals>.inner_mask" and set(held) == {
        "chunk_size",
        "left_padding",
    }:
        rule = window(0, 0, block=int(held["chunk_size"]))
        return Rule(rule, False, chunk_starts=held["left_padding"])
    return None


def _all_of(functions: tuple[Callable[..., Any], ...]) -> Rule | None:
    packed = _packed(functions)
    if packed is not None:
        return packed
    total = EVERYTHING
    for function in functions:
        rule = recognise(function)
        if rule is None or rule.documents is not None:
            return None
        if rule.chunk_starts is not None and total.chunk_starts is not None:
            return None
        mask = total.mask if rule.mask is None else rule.mask
        if rule.mask is not None and total.mask is not None:
            mask = total.mask & rule.mask
        starts = total.chunk_starts if rule.chunk_starts is None else rule.chunk_starts
        total = Rule(mask, total.causal or rule.causal, None, starts)
    return total


def _packed(functions: tuple[Callable[..., Any], ...]) -> Rule | None:
    """`same sequence` and `a rule on the positions inside it`, as masking_utils packs sequences.

    Inside a sequence the positions given are consecutive (that is how it was found), so a rule on
    distances says the same of plain indices.
    """
    if len(functions) != 2:
        return None
    first, second = functions
    if (
        getattr(first, "__qualname__", "") != "packed_sequence_mask_function.<locals>.inner_mask"
        or getattr(second, "__qualname__", "")
        != "remap_positions_for_packed_sequence.<locals>.inner_mask"
    ):
        return None
    ids, inside = _closure(first), _closure(second)
    if set(ids) != {"packed_sequence_mask"} or set(inside) != {"mask_function", "position_ids"}:
        return None
    rule = recognise(inside["mask_function"])
    if rule is None or rule.documents is not None or rule.chunk_starts is not None:
        return None
    return Rule(rule.mask, rule.causal, documents=ids["packed_sequence_mask"])


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    return {n: c.cell_contents for n, c in zip(function.__code__.co_freevars, cells)}


class Padding(NamedTuple):
    """Where each row's real tokens lie: indices starts[b] ... ends[b] - 1, both (B,) int64."""

    starts: Tensor
    ends: Tensor


def contiguous(present: Tensor) -> Padding | None:
    """The span of real tokens of each row of a bool (B, L); None if one has holes."""
    length = present.shape[1]
    count = present.sum(1)
    first = present.int().argmax(1)
    last = length - 1 - present.flip(1).int().argmax(1)
    if bool(torch.any((count > 0) & (last - first + 1 != count))):
        return None
    starts = torch.where(count > 0, first, torch.zeros_like(first))
    return Padding(starts, starts + count)
