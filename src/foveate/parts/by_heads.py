"""Several attentions over the heads of one layer: each on its heads, or all in one call.

A call for some heads copies their keys and values out of the cache. In decoding that costs more
than attending; there, patterns that positions alone decide are one layout over all heads. Where the
query heads of a key head see much the same, they are rows of one tile: its keys are read once. In
prefill, patterns of a class that can choose for all their heads at once are one pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.ops import AttentionOutput, Layout, Mask, attention
from foveate.ops.layout.join import by_heads, heads_as_rows, plain, tiled_row
from foveate.parts.attention import EVERYTHING, TILE, Attention, Pattern, mask_layout, remember
from foveate.parts.context import Context

Parts = Sequence[tuple[Sequence[int], Attention]]
_ROWS = 16  # query heads that are taken as rows of one tile at most
_WORTH = 2  # tiles that heads would read one by one, for each that their key heads read at once


@dataclass(frozen=True, eq=False)
class Together(Pattern):
    """All heads of a layer in one call.

    Attributes:
        masks: distinct ones; None is everything.
        owner: for each query head the index of its mask.
        rows: whether the query heads of a key head are rows of one tile; for one query.
    """

    masks: tuple[Mask | None, ...]
    owner: tuple[int, ...]
    rows: bool = False

    @override
    def is_dense(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        return self.masks == (ctx.mask,)

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        def build() -> Layout:
            return by_heads([mask_layout(m, q, k, ctx) for m in self.masks], self.owner)

        sizes = (q.shape[2], k.shape[2], q.device)
        return remember(ctx, (Together, self.masks, self.owner, *sizes), build)

    @override
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """As any pattern; with `rows`, each key head is read once for all its heads."""
        ctx = Context() if ctx is None else ctx
        if not self.rows:
            return super().__call__(q, k, v, ctx)
        kv_heads, kv_len = k.shape[1:3]
        group = q.shape[1] // kv_heads

        def build() -> Layout:
            rows = [_row(mask, q, k, ctx).known for mask in self.masks]
            return heads_as_rows(rows, self.owner, group, kv_len, TILE)

        key = (Together.__call__, self.masks, self.owner, group, kv_len, q.device)
        options = ctx.options
        if ctx.bias is not None and ctx.bias.shape[-3] > 1:
            options["bias"] = ctx.bias.unflatten(-3, (kv_heads, group)).squeeze(-2)
        found = attention(
            q.reshape(len(q), kv_heads, group, q.shape[3]), k, v,
            layout=remember(ctx, key, build), **options,
        )  # fmt: skip
        return AttentionOutput(
            found.out.reshape(*q.shape[:3], v.shape[3]), found.lse.reshape(q.shape[:3])
        )


class _Row(NamedTuple):
    """What one query sees, as `tiled_row` tells it; and its tiles, as the bits of a number."""

    known: Tensor
    tiles: int


def _row(mask: Mask | None, q: Tensor, k: Tensor, ctx: Context) -> _Row:
    """What the one query sees; asked once in a forward."""
    mask, kv_len = EVERYTHING if mask is None else mask, k.shape[2]

    def build() -> _Row:
        at = {"q_positions": ctx.q_positions, "kv_positions": ctx.kv_positions}
        known = tiled_row(mask.dense(1, kv_len, **at, device=q.device)[:, 0, 0], TILE)
        tiles = -(-kv_len // TILE)
        visited = (known[:, tiles * TILE : -tiles] > 0).any(0).tolist()
        return _Row(known, int("".join("01"[one] for one in visited), 2))

    return remember(ctx, (_row, mask, kv_len, q.device), build)


def _as_rows(
    masks: Sequence[Mask | None], owner: Sequence[int], q: Tensor, k: Tensor, ctx: Context
) -> bool:
    """Whether the query heads of a key head can be rows of one tile, and should.

    Not where somebody counts what each head visits, or keeps the call to repeat it.
    """
    group = q.shape[1] // k.shape[1]
    if not 1 < group <= _ROWS or q.shape[2] != 1 or not len(q):
        return False
    if ctx.sink_logits is not None or ctx.stats is not None or ctx.again is not None:
        return False
    if ctx.bias is not None and not (
        isinstance(ctx.bias, Tensor)
        and ctx.bias.dim() == 4
        and ctx.bias.shape[1] in (1, q.shape[1])
        and ctx.bias.shape[2] == 1
    ):
        return False
    if any(mask is not None and mask.groups()[1] > 1 for mask in masks):
        return False
    if torch.compiler.is_compiling():
        return False
    tiles = [_row(mask, q, k, ctx).tiles for mask in masks]
    alone = sum(tiles[one].bit_count() for one in owner)
    heads = range(0, len(owner), group)
    shared = [reduce(or_, (tiles[one] for one in owner[at : at + group])) for at in heads]
    return alone >= _WORTH * sum(one.bit_count() for one in shared)


def together(parts: Parts, q: Tensor, k: Tensor, ctx: Context) -> Together | None:
    """The parts as one pattern; None where they aren't told by positions alone.

    Args:
        parts: (query heads, attention), every head once.
        q: (B, Hq, Lq, D).
        k: (B, Hkv, Lkv, D).
        ctx: of the call, for all heads.
    """
    if ctx.cache is not None or (ctx.mask is not None and ctx.mask.groups()[1] > 1):
        return None
    masks: list[Mask | None] = []
    owner = [0] * q.shape[1]
    for heads, part in parts:
        # With weights, or with what was fitted, numbers may decide; else shapes and positions.
        decides = isinstance(part, nn.Module) or hasattr(part, "fitter")
        if not isinstance(part, Pattern) or decides or part.evicts:
            return None
        told, mask = _told(part, len(heads), q, k, ctx)
        if not told:
            return None
        if mask not in masks:
            masks.append(mask)
        for head in heads:
            owner[head] = masks.index(mask)
    found = Together(tuple(masks), tuple(owner))
    if found.is_dense(q, k, ctx):
        return found
    if _as_rows(masks, owner, q, k, ctx):
        return replace(found, rows=True)
    if all(plain(mask_layout(m, q, k, ctx)) for m in masks):
        return found
    return None


def joined(parts: Parts) -> Parts:
    """The same, with patterns as one where their class can choose for all their heads at once."""
    kinds: dict[type[Pattern], dict[int, Pattern]] = {}
    for heads, part in parts:
        if isinstance(part, Pattern):
            kinds.setdefault(type(part), {}).update(dict.fromkeys(heads, part))
    found: list[tuple[Sequence[int], Attention]] = []
    for kind, owners in kinds.items():
        heads = sorted(owners)
        several = sum(type(part) is kind for _, part in parts) > 1
        one = kind.for_heads([owners[head] for head in heads]) if several else None
        if one is not None:
            found.append((heads, one))
    done = {head for heads, _ in found for head in heads}
    return found + [(heads, part) for heads, part in parts if heads[0] not in done]


def key_heads(heads: Sequence[int], group: int) -> list[int]:
    """Key heads for these query heads, each once if they share them evenly."""
    owner = [head // group for head in heads]
    once = list(dict.fromkeys(owner))
    count = len(owner) // len(once)
    even = owner == [head for head in once for _ in range(count)]
    return once if even else owner


def _told(
    part: Pattern, heads: int, q: Tensor, k: Tensor, ctx: Context
) -> tuple[bool, Mask | None]:
    """Whether positions alone tell a pattern, and as which mask; asked once in a forward."""
    sizes = (heads, q.shape[2], k.shape[2], q.device)
    key = (_told, part, ctx.mask, ctx.phase, ctx.grid, ctx.step, *sizes)

    def ask() -> tuple[bool, Mask | None]:
        shapes = q[:, :heads], k[:, :1].expand(-1, heads, -1, -1)
        if part.is_dense(*shapes, ctx):
            return True, ctx.mask
        mask = part.rule(ctx)
        return mask is not None, mask

    try:
        return remember(ctx, key, ask)
    except TypeError:  # a pattern that has no hash
        return ask()


def attend_by_heads(parts: Parts, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
    """Each part on its query heads, and their key heads as often as they are read.

    Shapes as in `Attention`; `ctx.mask` is the same for all heads.
    """
    if ctx.phase == "decode":
        one = together(parts, q, k, ctx)
        if one is not None:
            return one(q, k, v, ctx)
    group = q.shape[1] // k.shape[1]
    parts = joined(parts)
    if len(parts) == 1 and list(parts[0][0]) == list(range(q.shape[1])):
        return parts[0][1](q, k, v, ctx)
    order, outs, sums = [], [], []
    for heads, method in parts:
        at = torch.tensor(heads, device=q.device)
        kv_at = key_heads(heads, group)
        bias = ctx.bias
        if isinstance(bias, Tensor) and bias.dim() > 2 and bias.shape[-3] > 1:
            bias = bias.index_select(-3, at)
        sinks = None if ctx.sink_logits is None else ctx.sink_logits[at]
        own = replace(ctx, bias=bias, sink_logits=sinks)
        part = method(q[:, at], k[:, kv_at], v[:, kv_at], own)
        order.append(at)
        outs.append(part.out)
        sums.append(part.lse)
    back = torch.argsort(torch.cat(order))
    return AttentionOutput(torch.cat(outs, 1)[:, back], torch.cat(sums, 1)[:, back])
