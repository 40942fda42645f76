"""Vertical-slash: key columns and diagonals, chosen from the attention of the last queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.mminference.distances import Distances
from foveate.methods.mminference.kernel_index import kernel_index
from foveate.methods.mminference.prefill import (
    PrefillPattern,
    ProblemPattern,
    budget,
    check_fraction,
)
from foveate.methods.mminference.problem import Part, Problem
from foveate.ops import Layout
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.anchor import Places, placed
from foveate.parts.attention import TILE, Pattern
from foveate.parts.context import Context
from foveate.parts.estimate import last_row_sums
from foveate.parts.listing import layout_of_runs
from foveate.parts.selection import topk_mask
from foveate.parts.tokens import Tokens, tokens_of

_LEAST_SLASHES = 50


@dataclass(frozen=True, eq=False)
class Index:
    """What was chosen, per sequence and query head.

    Attributes:
        columns: (B, Hq, Lkv) bool, V: keys that all later queries see.
        offsets: (B, Hq, Lkv) bool, T: distances i - j that all queries see.
        tokens: of the call that chose.
    """

    columns: Tensor
    offsets: Tensor
    tokens: Tokens

    def token_mask(self, q_len: int) -> Tensor:
        """The exact mask, j <= i and (j in V or i - j in T): bool (B, Hq, q_len, Lkv)."""
        kv_len = self.columns.shape[-1]
        own = torch.arange(q_len, device=self.columns.device) + self.tokens.shift[:, None]
        distance = own[..., None] - torch.arange(kv_len, device=own.device)
        distance = distance.expand(len(self.columns), -1, -1)[:, None]
        near = (distance >= 0) & (distance < kv_len)
        at = distance.clamp(0, kv_len - 1).expand(-1, self.offsets.shape[1], -1, -1)
        slash = self.offsets[:, :, None].expand(-1, -1, q_len, -1).gather(3, at) & near
        return (self.columns[:, :, None] | slash) & (distance >= 0)


@dataclass(frozen=True)
class VerticalSlash(ProblemPattern):
    """Query i sees key j if j <= i and (j in V or i - j in T); V, T per sequence and query head.

    Ahat, the attention of the last `last` real queries, is summed over rows per key and per
    distance; V are the `verticals` best keys, T the `slashes` best distances, with the first keys
    and the shortest distances forced in and counted. The kernel then visits, for each block of 64
    rows (the first begins at the first real one), 64-wide runs of keys that cover T and single keys
    for the rest of V, all it finds there included: a superset of the mask above. Within `ctx.mask`,
    which must be causal.

    The last queries choose for all, so the choice isn't causal, though the outputs are once it is
    held fixed (`index`, then `layout_from`). A chunk of a prompt chooses by its own last queries
    among all earlier keys. Packed documents share one choice, made by the last of them: call per
    document for the paper's. Decoding is dense. arXiv 2407.02490, algorithm 2.

    Attributes:
        verticals: keys in V (MInference's fallback head: 1000).
        slashes: distances in T (6096), at least 50.
        last: queries that choose (64).
        forced_verticals: first keys that are always in V (30).
        forced_slashes: shortest distances that are always in T (100; 30 in the paper's search).
        fraction: None as in the paper; our addition: V and T hold at most that share of each
            sequence's length, so that one setting serves short and long prompts.

    Raises:
        InputError: a field that doesn't fit, or a mask that isn't causal.
    """

    verticals: int = 1000
    slashes: int = 6096
    last: int = 64
    forced_verticals: int = 30
    forced_slashes: int = 100
    fraction: float | None = None

    def __post_init__(self) -> None:
        for name in ("verticals", "slashes", "forced_verticals"):
            whole("VerticalSlash", name, getattr(self, name), least=0)
        for name in ("last", "forced_slashes"):  # distance 0 leaves no row without a key
            whole("VerticalSlash", name, getattr(self, name), least=1)
        check_fraction("VerticalSlash", self.fraction)

    def _budgets(self, length: int) -> tuple[int, int]:
        """(nv, ns) for a sequence of that length."""
        return (
            max(budget(self.verticals, self.fraction, length), self.forced_verticals),
            max(budget(self.slashes, self.fraction, length), _LEAST_SLASHES),
        )

    @override
    def _keeps_all(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        return max(self._budgets(k.shape[2])) >= k.shape[2]

    def index(self, q: Tensor, k: Tensor, ctx: Context) -> Index:
        """Choose V and T; q (B, Hq, Lq, D), k (B, Hkv, Lkv, D)."""
        return _chosen((self,) * q.shape[1], q, k, ctx)

    def layout_from(self, index: Index, q: Tensor, k: Tensor, ctx: Context) -> Layout:
        """The layout of a choice that is held fixed; q and k give only their shapes."""
        return _visited(index, q, k, ctx)

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        return self.layout_from(self.index(q, k, ctx), q, k, ctx)

    @override
    @classmethod
    def for_heads(cls, methods: Sequence[VerticalSlash]) -> Pattern | None:
        alike = len({m.last for m in methods}) == 1
        own = all(type(m) is VerticalSlash for m in methods)
        return VerticalSlashes(tuple(methods)) if alike and own else None

    @override
    def parts(self, problem: Problem) -> list[list[Part]]:
        """V and T from the problem's own last queries; T are original distances."""
        rows, keys = (torch.arange(len(x), device=x.device) for x in (problem.rows, problem.keys))
        if not len(rows) or not len(keys):
            return [[] for _ in range(problem.heads)]
        nv, ns = self._budgets(len(keys))
        vertical = problem.column_sums.masked_fill(problem.k_at < self.forced_verticals, torch.inf)
        slash = problem.distance_sums.clone()
        slash[:, : self.forced_slashes] = torch.inf
        columns, offsets = topk_mask(vertical, nv), topk_mask(slash, ns)
        return [[Part(rows, keys, v, Distances(t))] for v, t in zip(columns, offsets)]


@dataclass(frozen=True)
class VerticalSlashes(PrefillPattern):
    """Query head h runs `methods[h]`; all by the same number of last queries."""

    methods: tuple[VerticalSlash, ...]

    @override
    def _keeps_all(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        return all(m._keeps_all(q, k, ctx) for m in self.methods)

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        if len(self.methods) != q.shape[1]:
            raise InputError(
                f"VerticalSlashes: {len(self.methods)} methods for {q.shape[1]} query heads; give "
                "one for each."
            )
        return _visited(_chosen(self.methods, q, k, ctx), q, k, ctx)


def _chosen(methods: Sequence[VerticalSlash], q: Tensor, k: Tensor, ctx: Context) -> Index:
    """V and T of each query head by its method."""
    tokens = tokens_of(q, k, ctx)
    if not tokens.causal:
        raise InputError(
            "vertical-slash is defined for causal attention, but the mask lets queries see "
            "later keys (no mask is everything); give Context(mask=causal()), or use a method "
            "that also goes both ways, such as block-sparse."
        )
    if not tokens.regular:
        raise InputError(
            "vertical-slash needs positions that count up by one, because a slash is a fixed "
            "distance; permute queries and keys after it, or use block-sparse."
        )
    sums = last_row_sums(q, k, ctx, tokens, methods[0].last)
    lengths = tokens.k_real.sum(1).expand(q.shape[0])
    first = tokens.k_real.int().argmax(1).expand(q.shape[0])[:, None]
    places = torch.arange(k.shape[2], device=q.device)
    reach = places < lengths[:, None]
    columns, offsets = (torch.zeros_like(x, dtype=torch.bool) for x in sums)
    heads: dict[VerticalSlash, list[int]] = {}
    for head, method in enumerate(methods):
        heads.setdefault(method, []).append(head)
    for method, mine in heads.items():
        if method._keeps_all(q, k, ctx):  # whatever the mask says, also of keys that aren't real
            columns[:, mine] = offsets[:, mine] = True
            continue
        forced = (places >= first) & (places < first + method.forced_verticals)
        vertical = sums.vertical[:, mine].masked_fill(forced[:, None], torch.inf)
        slash = sums.slash[:, mine].masked_fill(places < method.forced_slashes, torch.inf)
        for b, length in enumerate(lengths.tolist()):
            nv, ns = method._budgets(length)
            real = tokens.k_real[b if len(tokens.k_real) > 1 else 0]
            columns[b, mine] = topk_mask(vertical[b], nv, real)
            offsets[b, mine] = topk_mask(slash[b], ns, reach[b])
    return Index(columns, offsets, tokens)


def _visited(index: Index, q: Tensor, k: Tensor, ctx: Context) -> Layout:
    """What a kernel visits to cover V and T."""
    assert ctx.mask is not None
    tokens = index.tokens
    rows = Places.of(tokens.q_real, TILE)
    count = rows.index.shape[1]
    if rows.moved:
        at = tokens.q_pos[:, :1] - rows.front[:, None]
        steps = torch.arange(count, device=q.device)
        tokens = replace(tokens, q_pos=at + steps, shift=tokens.shift - rows.front)
    runs, singles = kernel_index(
        index.columns, index.offsets, tokens.shift, _first(tokens), count, TILE
    )
    sizes = (q.shape[0], q.shape[1], count, k.shape[2])
    found = layout_of_runs(runs, singles, ctx.mask, tokens, sizes, TILE)
    return placed(found, (q.shape[2], k.shape[2]), rows, None) if rows.moved else found


def _first(tokens: Tokens) -> Tensor:
    """(B',) index of the first real key."""
    return tokens.k_real.int().argmax(1)
