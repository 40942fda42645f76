"""Who sees whom between some tokens and others: a mask or a layout, cut down to what ranks hold.

A mask is asked at the tokens' global positions, so that every step's own rule follows from it: the
triangle, the rectangle or the nothing of a causal ring step, whichever way tokens are shared out. A
layout (a pattern that somebody chose) keeps its tiles; its rows are only numbered anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops import Layout, Mask
from foveate.ops.errors import InputError
from foveate.ops.layout.build import build
from foveate.ops.masks.base import Certainty
from foveate.parallel.context.restrict import of_heads, restricted

TILE = 128


@dataclass(frozen=True, eq=False)
class Part:
    """What one call of the core op visits; `layout` None means every pair."""

    queries: int
    keys: int
    layout: Layout | None
    _moved: dict[torch.device, Layout] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> Layout | None:
        """The layout on a device; moved there once."""
        if self.layout is None or self.layout.device == device:
            return self.layout
        found = self._moved.get(device)
        if found is None:
            found = self._moved[device] = self.layout.to(device)
        return found

    @property
    def empty(self) -> bool:
        """Whether nobody sees anything."""
        if not self.queries or not self.keys:
            return True
        return self.layout is not None and not self.layout.cols.numel()

    @property
    def pairs(self) -> float:
        """Pairs that attend, summed over the heads and batch entries that differ."""
        if self.layout is None:
            return float(self.queries * self.keys)
        return float(self.layout.pairs_by_group().sum()) if not self.empty else 0.0

    @property
    def tile_area(self) -> float:
        """Elements of visited tiles, mean over heads and batch entries."""
        if self.layout is None:
            return float(self.queries * self.keys)
        return self.layout.tile_area if not self.empty else 0.0

    def seen_keys(self) -> Tensor:
        """(keys,) bool: which keys any query sees."""
        if self.layout is None or self.empty:
            return torch.full((self.keys,), not self.empty, dtype=torch.bool)
        found = torch.zeros(self.keys + 1, dtype=torch.bool, device=self.layout.device)
        for entries in torch.arange(self.layout.cols.numel()).split(1024):
            at = self.layout.entry_keys(entries)
            any_row = self.layout.entry_mask(entries).any(1)
            found[at.masked_fill(at < 0, self.keys)[any_row]] = True
        return found[:-1]


class Rule:
    """Who sees whom in one sequence; `part` answers for some of its queries and keys."""

    length: int

    def part(
        self,
        queries: Tensor,
        keys: Tensor,
        heads: tuple[int, int, int] | None = None,
        tile: int = TILE,
    ) -> Part:
        """What these queries see of these keys.

        Args:
            queries: (n,) int64 tokens of the sequence, in the order of the call's rows.
            keys: (m,) likewise.
            heads: (first, count, of): the call holds query heads first ... first + count - 1 of
                `of`; None is all.
            tile: size of tiles, where it is free.
        """
        raise TypeError(f"{type(self).__name__} defines no part")


class MaskRule(Rule):
    """A mask, or everything.

    Args:
        mask: who may attend; None is everyone.
        length: tokens of the sequence.
        positions: where they stand, (S,) or (B, S); None is 0 ... S - 1.

    Raises:
        InputError: the mask is made for another length, or positions don't fit.
    """

    def __init__(self, mask: Mask | None, length: int, positions: Tensor | None = None) -> None:
        if mask is not None:
            mask._check(length, length)
        if positions is not None and (
            positions.dim() not in (1, 2)
            or positions.shape[-1] != length
            or positions.is_floating_point()
            or positions.dtype == torch.bool
        ):
            raise InputError(
                f"positions: expected integers ({length},) or (B, {length}), got "
                f"{positions.dtype} {tuple(positions.shape)}."
            )
        self.mask, self.length = mask, length
        self.positions = None if positions is None else positions.long().reshape(-1, length)

    @override
    def part(
        self,
        queries: Tensor,
        keys: Tensor,
        heads: tuple[int, int, int] | None = None,
        tile: int = TILE,
    ) -> Part:
        sizes = (len(queries), len(keys))
        if self.mask is None or 0 in sizes:
            return Part(*sizes, None)
        mask = self.mask
        if heads is not None and mask.groups()[1] > 1:
            mask = _OfHeads(mask, heads)
        rows = min(tile, max(8, -(-sizes[0] // 8) * 8))  # no empty rows for a few queries
        at = [queries[None], keys[None]]
        if self.positions is not None:
            at = [self.positions.to(x.device)[:, x[0]] for x in at]
        layout = build(mask, at[0], at[1], (rows, tile), None)
        groups = layout.groups[0] * layout.groups[1]
        every = layout.q_tiles * layout.kv_tiles * groups
        if layout.cols.numel() == every and not bool(layout.kinds.any()):
            return Part(*sizes, None)
        return Part(*sizes, layout)


class LayoutRule(Rule):
    """A layout for the whole sequence; its tiles are kept, whoever holds their rows.

    Raises:
        InputError: queries and keys aren't one sequence.
    """

    def __init__(self, layout: Layout) -> None:
        if layout.q_len != layout.kv_len:
            raise InputError(
                f"A layout of {layout.q_len} queries and {layout.kv_len} keys: context parallelism "
                "shares out one sequence, whose queries and keys are the same tokens."
            )
        self.layout, self.length = layout.checked(), layout.q_len

    @override
    def part(
        self,
        queries: Tensor,
        keys: Tensor,
        heads: tuple[int, int, int] | None = None,
        tile: int = TILE,
    ) -> Part:
        layout = self.layout if heads is None else of_heads(self.layout, heads)
        return Part(len(queries), len(keys), restricted(layout, queries, keys))


def rule_of(
    seen: Mask | Layout | Rule | None, length: int, positions: Tensor | None = None
) -> Rule:
    """The rule of a mask, a layout or nothing.

    Raises:
        InputError: it is made for another length, or a layout comes with positions.
    """
    if not isinstance(seen, Layout | Rule):
        return MaskRule(seen, length, positions)
    if positions is not None:
        raise InputError("positions are for masks; a layout names its tokens by their index.")
    rule = LayoutRule(seen) if isinstance(seen, Layout) else seen
    if rule.length != length:
        raise InputError(f"The layout is for {rule.length} tokens, the sequence has {length}.")
    return rule


class _OfHeads(Mask):
    """A mask that differs by head, for some of the query heads."""

    __slots__ = ("first", "inner", "many", "of")

    def __init__(self, inner: Mask, heads: tuple[int, int, int]) -> None:
        self.inner = inner
        self.first, self.many, self.of = heads
        super().__init__(f"heads({inner.spec}, {heads})", inner.tensors)

    @override
    def groups(self) -> tuple[int, int]:
        return (self.inner.groups()[0], self.many)

    def _head(self, h: int) -> int:
        return (self.first + h) * self.inner.groups()[1] // self.of

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        return self.inner._element(q, k, b, self._head(h))

    def _tiles(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int
    ) -> Certainty:
        return self.inner._tiles(q_lo, q_hi, k_lo, k_hi, b, self._head(h))
