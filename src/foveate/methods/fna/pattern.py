"""Fused neighborhood attention: each token of a grid attends to the window of its nearest tokens.

    s_ij = scale q_i . k_j for j in W(i),  out_i = sum_j softmax(s_i)_j v_j

W(i) is the rule of `foveate.ops.masks.axis` on each axis. The core op goes by multi-axis tiles,
whose tokens it finds by row indices, and visits the key tiles that each query tile's windows touch.
A model whose layers all agree on tiles moves its tokens once for all of them: it gives them in the
order of `GridLayout.q_slots` and their numbers as positions, and no index is left.

Source: Hassani et al. 2024, arXiv 2403.04690, sections 3.2 and 3.3; windows: Hassani et al. 2022,
arXiv 2204.07143, and 2022, arXiv 2209.15001 (dilation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops import Layout, Mask, causal, neighborhood, region, strided
from foveate.ops.errors import InputError
from foveate.ops.layout.grid import GridLayout, best_tiles, grid_layout
from foveate.ops.masks.checks import whole
from foveate.ops.masks.grid import per_axis
from foveate.parts.attention import Pattern, mask_layout, remember
from foveate.parts.context import Context
from foveate.parts.tokens import tokens_of

Sizes = int | tuple[int, ...]


@dataclass(frozen=True)
class FNA(Pattern):
    """Query i sees the `window` tokens nearest to it on every axis of the grid, within `ctx.mask`.

    The grid is `shape`, else `ctx.grid`, else one axis: the whole sequence, on which a window that
    is longer than the sequence is cut to it and causality is that of `ctx.mask`.

    Attributes:
        window: keys on each axis, or one number for all (paper: 7).
        dilation: distance of neighbouring keys.
        causal: for each axis whether no later key is seen; None is no on a grid, and as `ctx.mask`
            says on a sequence.
        shape: of the grid, so that models that don't tell it can be used.
        before: tokens in front of the grid's (a class token, registers), which see everything and
            are seen by all.
        after: such tokens behind the grid's (text).
        q_tile: queries of a tile on each axis; None takes 128 in the shape that visits the least.
        kv_tile: keys of a tile; None takes 64.

    Raises:
        InputError: a field that fits no grid; a grid that doesn't fit the tokens.
    """

    window: Sizes = 7
    dilation: Sizes = 1
    causal: bool | tuple[bool, ...] | None = None
    shape: tuple[int, ...] | None = None
    before: int = 0
    after: int = 0
    q_tile: tuple[int, ...] | None = None
    kv_tile: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("window", "dilation", "causal", "shape", "q_tile", "kv_tile", "stride"):
            given = getattr(self, name, None)
            if isinstance(given, list):
                object.__setattr__(self, name, tuple(given))
        for name in ("before", "after"):
            whole(type(self).__name__, name, getattr(self, name), least=0)
        for name in ("window", "dilation", "stride"):
            given = getattr(self, name, 1)
            for value in given if isinstance(given, tuple) else (given,):
                whole(type(self).__name__, name, value, least=1)
        if (self.q_tile is None) != (self.kv_tile is None):
            raise InputError(f"{type(self).__name__}: give both q_tile and kv_tile, or neither.")
        if self.shape is not None:
            self.on(self.shape)

    @property
    def strides(self) -> Sizes:
        """Queries that share a window, on each axis."""
        return 1

    def on(self, shape: tuple[int, ...]) -> neighborhood:
        """The mask over a grid of this shape."""
        past = False if self.causal is None else self.causal
        return neighborhood(shape, self.window, self.strides, self.dilation, past)

    def tiles(self, mask: neighborhood, device: torch.device | str = "cpu") -> GridLayout:
        """The tiles that a call over the mask's grid visits."""
        if self.q_tile is None or self.kv_tile is None:
            q_tile, kv_tile = best_tiles(mask)
        else:
            q_tile, kv_tile = self.q_tile, self.kv_tile
        return grid_layout(mask, q_tile, kv_tile, (self.before, self.after), str(device))

    def grid_of(self, q: Tensor, k: Tensor, ctx: Context) -> neighborhood:
        """The mask over the grid of this call.

        Raises:
            InputError: grid and tokens don't fit.
        """
        kv_len = k.shape[2]
        beside = self.before + self.after
        shape = self.shape if self.shape is not None else ctx.grid
        if shape is None:
            return self._sequence(kv_len - beside, q, k, ctx)
        if math.prod(shape) + beside != kv_len:
            more = f" and {beside} beside it" if beside else ""
            raise InputError(
                f"{type(self).__name__}: a grid of {' x '.join(map(str, shape))} tokens{more} "
                f"doesn't make {kv_len} keys; give shape=, before= and after= as the tokens lie."
            )
        return self.on(tuple(shape))

    def _sequence(self, length: int, q: Tensor, k: Tensor, ctx: Context) -> neighborhood:
        if length < 1:
            raise InputError(f"{type(self).__name__}: no token is left for the grid.")
        window, stride, dilation = self._line()
        past = self.causal
        if past is None:
            past = ctx.mask is not None and tokens_of(q, k, ctx).causal
        dilation = min(dilation, length)
        window = min(window, length // dilation)
        return neighborhood(length, window, min(stride, window), dilation, past)

    def _line(self) -> tuple[int, int, int]:
        """Window, stride and dilation where the grid is one axis."""
        fields = ("window", self.window), ("stride", self.strides), ("dilation", self.dilation)
        window, stride, dilation = (per_axis(type(self).__name__, *x, 1)[0] for x in fields)
        return window, stride, dilation

    def _earlier(self, mask: neighborhood, ctx: Context) -> Mask | None:
        """All earlier tokens of the residue, where a causal sequence is shorter than the window.

        What a token sees must not depend on how many come after it, and a window that fits every
        residue would leave out the first token of the longer ones.
        """
        if self.shape is not None or ctx.grid is not None or not mask.axes[0].causal:
            return None
        window, _, dilation = self._line()
        if window * dilation <= mask.tokens:
            return None
        return causal() & strided(dilation, axis="offset")

    def within(self, mask: neighborhood, among: Mask | None = None) -> Mask:
        """The mask of all tokens: the grid's among themselves, those beside it with everyone.

        Args:
            mask: over the grid's tokens.
            among: what these see of each other; None is `mask`.
        """
        start, tokens = self.before, mask.tokens + self.before + self.after
        stop = start + mask.tokens
        among = mask if among is None else among
        if not self.before and not self.after:
            return among
        all_, inner = (0, tokens), (start, stop)
        rule: Mask = region(among, inner, inner)
        for span in ((0, start), (stop, tokens)):
            if span[0] < span[1]:
                rule = rule | region(None, all_, span) | region(None, span, all_)
        return rule

    @override
    def rule(self, ctx: Context) -> Mask | None:
        shape = self.shape if self.shape is not None else ctx.grid
        if shape is None:
            return None
        rule = self.within(self.on(tuple(shape)))
        return rule if ctx.mask is None else ctx.mask & rule

    @override
    def is_dense(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        return all(axis.whole for axis in self.grid_of(q, k, ctx).axes)

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        mask = self.grid_of(q, k, ctx)
        earlier = self._earlier(mask, ctx)
        if ctx.mask is None and earlier is None and q.shape[2] == k.shape[2]:
            grid = self.tiles(mask, q.device)
            if ctx.q_positions is None and ctx.kv_positions is None:
                return grid.row_by_row
            orders = _order(ctx.q_positions, q), _order(ctx.kv_positions, k)
            if orders[0] is not _MIXED and orders[1] is not _MIXED:
                return remember(ctx, grid, lambda: grid.indexed(*orders))
        rule = self.within(mask, earlier)
        return mask_layout(rule if ctx.mask is None else ctx.mask & rule, q, k, ctx)


_MIXED = torch.empty(0)


def _order(positions: Tensor | None, x: Tensor) -> Tensor | None:
    """Positions that name every token once, or `_MIXED`; None is row by row."""
    if positions is None:
        return None
    if positions.dim() == 2 and positions.shape[0] == 1:
        positions = positions[0]
    every = torch.arange(x.shape[2], device=positions.device)
    once = positions.dim() == 1 and torch.equal(positions.sort().values, every)
    return positions if once else _MIXED
