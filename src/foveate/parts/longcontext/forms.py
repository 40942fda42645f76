"""The catalogue's masks as other systems write them: slices, and FlashMask's column intervals.

A slice is (query range, key range, type); types and alignment as in `Layout.from_slices`, which
reads them, as MagiAttention does. Column intervals say for each key which rows do *not* see it:
[LTS, LTE) below the diagonal and [UTS, UTE) above; `Layout.from_column_intervals` reads them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops import Mask
from foveate.ops.errors import InputError
from foveate.parts.longcontext.masks import Settings

Span = tuple[int, int]
Slice = tuple[Span, Span, str]


def slices(name: str, s: Settings) -> list[Slice]:
    """A fixed mask of the catalogue as slices that don't overlap.

    Raises:
        InputError: the mask has no such form here: it is drawn by tables or single keys.
    """
    n, docs = s.length, list(zip(s.bounds, s.bounds[1:]))
    every: Span = (0, n)
    if name == "full":
        found: list[Slice] = [(every, every, "full")]
    elif name == "causal":
        found = [(every, every, "causal")]
    elif name == "full-document":
        found = [(d, d, "full") for d in docs]
    elif name == "causal-document":
        found = [(d, d, "causal") for d in docs]
    elif name == "sliding":
        found = _band(0, n, s.window, s.window)
    elif name == "causal-sliding":
        found = _band(0, n, s.window, 0)
    elif name == "shared-question":
        found = [(d, d, "causal") for d in docs] + [(d, docs[0], "full") for d in docs[1:]]
    elif name == "global-sliding":
        g = min(s.global_tokens, n)
        found = [((0, g), every, "full"), ((g, n), (0, g), "full")]
        found += _band(g, n, s.window, s.window)
    elif name == "causal-blockwise":
        found = [(d, d, "causal") for d in docs[:-1]] + [(docs[-1], every, "causal")]
    elif name == "prefix-causal":
        found = _prefixed(0, n, min(s.prefix, n))
    elif name == "prefix-document":
        found = [x for (a, b), p in zip(docs, s.prefixes) for x in _prefixed(a, b, p)]
    elif name == "block-causal-document":
        found = [
            ((start, min(b, start + s.block)), (a, min(b, start + s.block)), "full")
            for a, b in docs
            for start in range(a, b, s.block)
        ]
    elif name == "qk-sparse":
        found = _without_squares(n, s.squares)
    else:
        raise InputError(
            f"slices({name!r}): only masks of whole ranges have slices; those that are drawn have "
            "tables or column intervals."
        )
    return [x for x in found if x[0][0] < x[0][1] and x[1][0] < x[1][1]]


def _band(start: int, end: int, left: int, right: int) -> list[Slice]:
    """Queries and keys start ... end - 1, i - left <= j <= i + right."""
    cuts = sorted({start, end, min(end, start + left), max(start, end - right)})
    found: list[Slice] = []
    for a, b in zip(cuts, cuts[1:]):
        below, above = a >= start + left, b <= end - right
        keys = (a - left if below else start, b + right if above else end)
        kind = {(1, 1): "bi_causal", (1, 0): "inv_causal", (0, 1): "causal", (0, 0): "full"}
        found.append(((a, b), keys, kind[below, above]))
    return found


def _prefixed(a: int, b: int, size: int) -> list[Slice]:
    middle = min(b, a + size)
    return [((a, middle), (a, middle), "full"), ((middle, b), (a, b), "causal")]


def _without_squares(n: int, squares: tuple[Span, ...]) -> list[Slice]:
    found: list[Slice] = []
    at = 0
    for lo, hi in sorted(squares):
        if lo < at:
            raise InputError("slices('qk-sparse'): the squares overlap.")
        hi = min(hi, n)
        found += [((at, lo), (0, lo), "causal"), ((lo, hi), (0, lo), "full")]
        at = hi
    return [*found, ((at, n), (0, n), "causal")]


class ColumnIntervals(NamedTuple):
    """Rows that don't see key j: lts[j] ... lte[j] - 1 and uts[j] ... ute[j] - 1; each (S,)."""

    lts: Tensor
    lte: Tensor
    uts: Tensor
    ute: Tensor


def column_intervals(mask: Mask, length: int) -> ColumnIntervals:
    """Any mask of one head and S queries and keys as column intervals, read off its elements.

    Raises:
        InputError: a key is hidden from more than one stretch of rows above the diagonal, or below.
    """
    if mask.groups() != (1, 1):
        raise InputError("column_intervals: the mask differs by head or batch entry; take one.")
    mask._check(length, length)
    found = []
    rows = torch.arange(length)[:, None]
    for keys in torch.arange(length).split(max(1, 2**22 // max(1, length))):
        seen = mask._element(rows, keys[None], 0, 0).expand(length, len(keys))
        sides = []
        for part, none in ((rows > keys, length), (rows <= keys, 0)):
            hidden = ~seen & part
            some = hidden.any(0)
            first = hidden.int().argmax(0)
            last = length - hidden.flip(0).int().argmax(0)
            if bool((hidden.sum(0) != (last - first) * some).any()):
                raise InputError(
                    "column_intervals: a key is hidden from several stretches of rows on one side "
                    "of the diagonal; FlashMask can't say that."
                )
            empty = torch.full_like(first, none)
            sides += [torch.where(some, first, empty), torch.where(some, last, empty)]
        found.append(sides)
    return ColumnIntervals(*(torch.cat(x) for x in zip(*found)))
