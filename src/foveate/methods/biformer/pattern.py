"""Bi-level routing as an attention: regions choose regions, their tokens attend to tokens.

Source: Zhu et al. 2023, arXiv 2303.08810, section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.biformer.regions import Regions, grid_regions
from foveate.methods.biformer.routing import (
    affinity,
    region_layout,
    route,
    soft_attention,
    soft_weights,
    tile_of,
    with_rows,
)
from foveate.ops import AttentionOutput, Layout
from foveate.ops.errors import InputError
from foveate.ops.layout.build import build
from foveate.ops.masks.checks import whole
from foveate.parts.attention import EVERYTHING, Pattern, remember
from foveate.parts.context import Context
from foveate.parts.listing import kind_table, restrict
from foveate.parts.tokens import Tokens, tokens_of


@dataclass(frozen=True)
class BiLevelRouting(Pattern):
    """Queries of a region see the tokens of the `topk` regions whose mean keys suit it best.

    The grid is `shape`, else `ctx.grid`, else one axis, the whole sequence; tokens lie row by row.
    Means are over real tokens, so padding changes no choice. A region need not choose itself.
    Within `ctx.mask`: regions of which a mask hides everything aren't chosen, and of the others
    what it hides isn't seen. A mean holds a region's later tokens, so the choice isn't causal
    though the outputs are.

    Attributes:
        topk: regions that each region sees (paper: 1, 4, 16 in its first three stages).
        regions: on each axis, or one number for all (paper: 7).
        shape: of the grid, so that models that don't tell it can be used; a number is one axis.
        kv_shape: of the keys' grid, where it isn't that of the queries (keys that were pooled); as
            many regions on each axis.
        soft: keys and values of a chosen region count times the softmax of its affinity.
        differentiable: with `soft`, gradients reach queries and keys by those weights, too.

    Raises:
        InputError: a field that doesn't fit; a grid that doesn't fit the tokens.
    """

    topk: int = 4
    regions: int | tuple[int, ...] = 7
    shape: tuple[int, ...] | None = None
    kv_shape: tuple[int, ...] | None = None
    soft: bool = False
    differentiable: bool = False

    def __post_init__(self) -> None:
        for name in ("regions", "shape", "kv_shape"):
            given = getattr(self, name)
            if given is None or name == "regions" and not isinstance(given, tuple | list):
                continue
            axes = tuple(given) if isinstance(given, tuple | list) else (given,)
            object.__setattr__(self, name, axes)
            for value in axes:
                whole("BiLevelRouting", name, value, least=1)
        whole("BiLevelRouting", "topk", self.topk, least=1)
        if not isinstance(self.regions, tuple):
            whole("BiLevelRouting", "regions", self.regions, least=1)
        if self.kv_shape is not None and self.shape is None:
            raise InputError("BiLevelRouting(kv_shape=...): give shape=, the queries' grid, too.")
        if self.differentiable and not self.soft:
            raise InputError(
                "BiLevelRouting(differentiable=True): a hard choice has no gradient; give "
                "soft=True, too."
            )

    def partition(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Regions, Regions]:
        """The regions of queries and of keys.

        Raises:
            InputError: grid and tokens don't fit.
        """
        shape = self.shape if self.shape is not None else ctx.grid
        if shape is None:
            if q.shape[2] != k.shape[2]:
                raise InputError(
                    f"BiLevelRouting: {q.shape[2]} queries against {k.shape[2]} keys. Regions are "
                    "of one whole sequence or grid, so there is no step-by-step decoding; give "
                    "shape= and kv_shape= for keys on a grid of their own."
                )
            shape = (k.shape[2],)
        elif ctx.q_positions is not None or ctx.kv_positions is not None:
            raise InputError("BiLevelRouting: on a grid tokens lie row by row; give no positions.")
        shapes = tuple(shape), tuple(self.kv_shape or shape)
        for name, grid, x in (("queries", shapes[0], q), ("keys", shapes[1], k)):
            if math.prod(grid) != x.shape[2]:
                raise InputError(
                    f"BiLevelRouting: a grid of {' x '.join(map(str, grid))} doesn't make "
                    f"{x.shape[2]} {name}; give shape= (and kv_shape=) as the tokens lie."
                )
        return (
            grid_regions(shapes[0], self.regions, device=q.device),
            grid_regions(shapes[1], self.regions, device=k.device),
        )

    def choose(self, q: Tensor, k: Tensor, ctx: Context) -> Tensor:
        """I (B, p, min(topk, p)): the regions that each region sees, best first, -1 for none."""
        queries, keys, allowed = self._seen(q, k, ctx)
        with torch.no_grad():
            return route(affinity(queries.means(q), keys.means(k)), self.topk, allowed)

    def _seen(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Regions, Regions, Tensor]:
        """Regions of real tokens, and which of keys those of queries may see at all."""
        queries, keys = self.partition(q, k, ctx)
        if ctx.mask is None:
            return queries, keys, (keys.per_region > 0)[:, None]
        tokens = tokens_of(q, k, ctx)
        base = self._mask_layout(queries, keys, tokens, ctx)
        seen = kind_table(base) >= 0
        seen = seen.unflatten(3, (keys.count, -1)).any(-1)
        seen = seen.unflatten(2, (queries.count, -1)).any(3).any(1)
        queries, keys = queries.only(tokens.q_real), keys.only(tokens.k_real)
        return queries, keys, seen & (keys.per_region > 0)[:, None]

    def _mask_layout(self, queries: Regions, keys: Regions, tokens: Tokens, ctx: Context) -> Layout:
        """All that the mask allows, region by region; kept in `ctx.store`."""
        mask = EVERYTHING if ctx.mask is None else ctx.mask
        tile = (tile_of(queries.size), tile_of(keys.size))

        def make() -> Layout:
            mask._check(queries.tokens, keys.tokens)
            q_at, k_at = (
                _nearest(part.padded(size)[0])
                for part, size in ((queries, tile[0]), (keys, tile[1]))
            )
            with torch.inference_mode(False):  # what is kept must serve training, too
                made = build(mask, tokens.q_pos[:, q_at], tokens.k_pos[:, k_at], tile, None)
            return with_rows(made, queries, keys)

        return remember(ctx, (self, mask, queries, keys), make)

    @override
    def is_dense(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        return not self.soft and self.topk >= self.partition(q, k, ctx)[1].count

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        queries, keys = self.partition(q, k, ctx)
        chosen = self.choose(q, k, ctx)
        if ctx.mask is None:
            return region_layout(chosen, queries, keys)
        base = self._mask_layout(queries, keys, tokens_of(q, k, ctx), ctx)
        tiles = torch.zeros(
            len(chosen), queries.count, keys.count + 1, dtype=torch.bool, device=q.device
        )
        tiles = tiles.scatter(2, chosen.where(chosen >= 0, keys.count), True)[..., :-1]
        tiles = tiles.repeat_interleave(base.q_tiles // queries.count, 1)
        tiles = tiles.repeat_interleave(base.kv_tiles // keys.count, 2)
        return with_rows(restrict(base, tiles[:, None]), queries, keys)

    @override
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """As `Pattern.__call__`; with `soft` one region after the other, merged by their lse."""
        ctx = Context() if ctx is None else ctx
        if not self.soft or not q.shape[0]:
            return super().__call__(q, k, v, ctx)
        if ctx.mask is not None or ctx.dropout or ctx.sink_logits is not None:
            raise InputError(
                "BiLevelRouting(soft=True) takes no mask, dropout or sink logits: its parts are "
                "scored and merged one by one."
            )
        queries, keys = self.partition(q, k, ctx)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            scores = affinity(queries.means(q), keys.means(k))
            chosen = route(scores.detach(), self.topk, (keys.per_region > 0)[:, None])
            weights = soft_weights(scores, chosen, (q.shape[1] * q.shape[3]) ** -0.5)
        return soft_attention(q, k, v, chosen, weights, (queries, keys), ctx.options)


def _nearest(slots: Tensor) -> Tensor:
    """Table rows (p, m) as tokens (p m,), holes as the first token of their row, or token 0."""
    return slots.where(slots >= 0, slots[:, :1].clamp_min(0)).flatten()
