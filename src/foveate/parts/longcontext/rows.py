"""Keys that each query sees, by formula: for sequences too long to list tiles of.

At millions of tokens a list of tiles doesn't fit, and what a planner needs is how much work each
query is. All masks of the catalogue that ranges define have a closed form in i, the document's
bounds and the sizes; the sums over all queries are the masks' areas.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.ops.errors import InputError, nearest
from foveate.parts.longcontext.masks import Settings


def row_counts(name: str, s: Settings) -> Tensor:
    """(S,) int64: how many keys query i sees under a mask of the catalogue.

    Raises:
        InputError: the mask has no closed form here.
    """
    if name not in _FORMULAS:
        raise InputError(
            f"row_counts({name!r}): no formula; {nearest(name, _FORMULAS)} For the others count a "
            "layout: foveate.parallel.context.row_pairs."
        )
    i = torch.arange(s.length)
    sizes = torch.tensor(s.bounds).diff()
    which = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    start = torch.tensor(s.bounds)[which]
    return _FORMULAS[name](s, i, start, start + sizes[which], which)


Formula = Callable[[Settings, Tensor, Tensor, Tensor, Tensor], Tensor]


def _band(i: Tensor, left: int, right: int, low: int, high: int) -> Tensor:
    """Keys of low ... high - 1 within i - left ... i + right."""
    return ((i + right + 1).clamp_max(high) - (i - left).clamp_min(low)).clamp_min(0)


def _global(s: Settings, i: Tensor, *_: Tensor) -> Tensor:
    g = min(s.global_tokens, s.length)
    seen = g + _band(i, s.window, s.window, g, s.length)
    return torch.where(i < g, s.length, seen)


def _blockwise(s: Settings, i: Tensor, start: Tensor, end: Tensor, which: Tensor) -> Tensor:
    return torch.where(start == s.bounds[-2], i + 1, i - start + 1)


def _prefix_document(s: Settings, i: Tensor, start: Tensor, end: Tensor, which: Tensor) -> Tensor:
    size = torch.tensor(s.prefixes)[which]
    return torch.maximum(i - start + 1, torch.where(i - start < size, size, 0))


def _block_causal(s: Settings, i: Tensor, start: Tensor, end: Tensor, which: Tensor) -> Tensor:
    return torch.minimum(((i - start) // s.block + 1) * s.block, end - start)


_FORMULAS: dict[str, Formula] = {
    "full": lambda s, i, start, end, which: torch.full_like(i, s.length),
    "causal": lambda s, i, start, end, which: i + 1,
    "full-document": lambda s, i, start, end, which: end - start,
    "causal-document": lambda s, i, start, end, which: i - start + 1,
    "sliding": lambda s, i, start, end, which: _band(i, s.window, s.window, 0, s.length),
    "causal-sliding": lambda s, i, start, end, which: _band(i, s.window, 0, 0, s.length),
    "shared-question": lambda s, i, start, end, which: (
        i - start + 1 + torch.where(start > 0, s.bounds[1], 0)
    ),
    "global-sliding": _global,
    "causal-blockwise": _blockwise,
    "prefix-causal": lambda s, i, start, end, which: torch.where(
        i < s.prefix, torch.maximum(i + 1, torch.full_like(i, min(s.prefix, s.length))), i + 1
    ),
    "prefix-document": _prefix_document,
    "block-causal-document": _block_causal,
}


def counted() -> tuple[str, ...]:
    """Names of the masks that have a formula."""
    return tuple(_FORMULAS)
