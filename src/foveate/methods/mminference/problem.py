"""A part of one sequence's attention: queries of one kind on keys of one kind, and its estimate.

Boundaries between modalities cut attention into such problems (MMInference, arXiv 2504.16083,
section 3.3). Each keeps original positions, on which causality rests, and each token's number in
its own modality, in which the lines of a grid are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops import Mask
from foveate.ops.errors import InputError
from foveate.parts.attention import EVERYTHING
from foveate.parts.context import Context
from foveate.parts.form import is_causal_or_full
from foveate.parts.tokens import Tokens, tokens_of

OUTSIDE = -1


class Part(NamedTuple):
    """Queries that see some keys wholly and of the others what a mask tells, up to their own token.

    Attributes:
        rows: (n,) index of each query among the problem's.
        keys: (m,) index of each key among the problem's.
        columns: (m,) bool, keys that all rows see; None is none.
        band: which of the other keys, by original positions or by `numbers`; None is none.
        numbers: ((n,), (m,)) what the band is asked about; None is original positions.
    """

    rows: Tensor
    keys: Tensor
    columns: Tensor | None = None
    band: Mask | None = EVERYTHING
    numbers: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """Queries and keys of one sequence.

    Attributes:
        q: (Hq, n, D).
        k: (Hkv, m, D).
        rows: (n,) index of each query in the call.
        keys: (m,) index of each key in the call.
        q_at: (n,) position of each query, from the sequence's first token.
        k_at: (m,) of each key.
        q_number: (n,) which token of its modality each query is.
        k_number: (m,) likewise; OUTSIDE for a key of a modality that isn't the problem's own.
        ctx: scale and softcap.
        last: queries that estimate.
    """

    q: Tensor
    k: Tensor
    rows: Tensor
    keys: Tensor
    q_at: Tensor
    k_at: Tensor
    q_number: Tensor
    k_number: Tensor
    ctx: Context
    last: int = 64

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.q.shape[0]

    @cached_property
    def estimate(self) -> Tensor:
        """Ahat (Hq, last, m): attention of the last queries to the keys, rows that see none 0."""
        q, k = self.q[:, -self.last :], self.k
        work = torch.promote_types(q.dtype, torch.float32)
        scale = q.shape[2] ** -0.5 if self.ctx.scale is None else self.ctx.scale
        grouped = q.to(work).unflatten(0, (k.shape[0], -1))
        scores = (grouped @ k.to(work)[:, None].mT).flatten(0, 1) * scale
        if self.ctx.softcap is not None:
            scores = self.ctx.softcap * torch.tanh(scores / self.ctx.softcap)
        hidden = self.k_at > self.q_at[-self.last :, None]
        some = hidden.any(0).nonzero()[:, 0]
        if len(some):  # few: keys that stand behind some of these last queries
            first = int(some[0])
            scores[..., first:].masked_fill_(hidden[:, first:], -torch.inf)
        found = torch.softmax(scores, -1)
        return found.nan_to_num_(0.0) if bool(hidden.all(1).any()) else found

    @cached_property
    def column_sums(self) -> Tensor:
        """c_j (Hq, m): sum of Ahat over its rows."""
        return self.estimate.sum(1)

    @cached_property
    def distance_sums(self) -> Tensor:
        """o_t (Hq, N): sum of Ahat over the pairs at original distance t >= 0."""
        return self._by_distance(self.q_at, self.k_at, self.k_at >= 0)

    @cached_property
    def number_sums(self) -> Tensor:
        """The same at distances in numbers of the modality's own tokens: (Hq, N)."""
        return self._by_distance(self.q_number, self.k_number, self.k_number != OUTSIDE)

    def _by_distance(self, q_at: Tensor, k_at: Tensor, counts: Tensor) -> Tensor:
        distance = q_at[-self.last :, None] - k_at
        size = int(q_at.max()) + 1 if len(q_at) else 0
        sums = self.estimate.new_zeros(self.heads, size)
        seen = (distance >= 0) & counts
        return sums.index_add(1, distance[seen], self.estimate[:, seen])


def problems(q: Tensor, k: Tensor, ctx: Context, last: int, owner: str) -> list[Problem]:
    """Each sequence as one problem, numbered from its first token.

    Args:
        q: (B, Hq, Lq, D).
        k: (B, Hkv, Lkv, D).
        ctx: whose mask must be causal, padding apart.
        last: queries that estimate.
        owner: who asks, for the errors.

    Raises:
        InputError: the mask isn't causal, or positions don't count up by one.
    """
    tokens = _tokens(q, k, ctx, owner)
    found = []
    for b in range(q.shape[0]):
        rows, keys, q_at, k_at = _real(tokens, b)
        found.append(
            Problem(q[b][:, rows], k[b][:, keys], rows, keys, q_at, k_at, q_at, k_at, ctx, last)
        )
    return found


def problems_by_query(
    q: Tensor, k: Tensor, ctx: Context, last: int, owner: str
) -> list[list[tuple[int, Problem]]]:
    """Per sequence and modality of its queries, all keys: (modality, problem)."""
    return [
        [(a, _picked(q, k, ctx, last, b, modality, a, None)) for a in _kinds(modality)]
        for b, modality in _modalities(q, k, ctx, owner)
    ]


def problems_by_pair(
    q: Tensor, k: Tensor, ctx: Context, last: int, owner: str
) -> list[list[tuple[int, int, Problem]]]:
    """Per sequence and pair of modalities of queries and keys: (a, b, problem)."""
    return [
        [
            (a, c, _picked(q, k, ctx, last, b, modality, a, c))
            for a in _kinds(modality)
            for c in _kinds(modality)
        ]
        for b, modality in _modalities(q, k, ctx, owner)
    ]


def _modalities(q: Tensor, k: Tensor, ctx: Context, owner: str) -> list[tuple[int, Tensor]]:
    """(batch entry, (Lkv,) modality of each key); zeros if the context knows of none."""
    _tokens(q, k, ctx, owner)
    given = ctx.modality
    if given is None:
        given = torch.zeros(k.shape[2], dtype=torch.int64, device=q.device)
    if given.shape[-1] != k.shape[2] or given.dim() not in (1, 2):
        raise InputError(
            f"{owner}: Context(modality=...) must be ({k.shape[2]},) or (B, {k.shape[2]}), one "
            f"integer for each key, got {tuple(given.shape)}."
        )
    given = given.to(q.device).expand(q.shape[0], -1)
    return list(enumerate(given.unbind(0)))


def _kinds(modality: Tensor) -> list[int]:
    return [int(kind) for kind in modality.unique()]


def _picked(
    q: Tensor,
    k: Tensor,
    ctx: Context,
    last: int,
    b: int,
    modality: Tensor,
    of_queries: int,
    of_keys: int | None,
) -> Problem:
    rows, keys, q_at, k_at = _real(tokens_of(q, k, ctx), b)
    kind = modality[keys]
    own = kind == of_queries
    number = torch.zeros_like(k_at)
    for one in _kinds(kind):
        number[kind == one] = torch.arange(int((kind == one).sum()), device=q.device)
    here = torch.searchsorted(k_at, q_at)  # every query is a key as well
    some = own[here]
    if of_keys is None:
        k_number = torch.where(own, number, OUTSIDE)
    else:
        at = (kind == of_keys).nonzero()[:, 0]
        keys, k_at, k_number = keys[at], k_at[at], number[at]
    rows, q_at, q_number = rows[some], q_at[some], number[here[some]]
    return Problem(
        q[b][:, rows], k[b][:, keys], rows, keys, q_at, k_at, q_number, k_number, ctx, last
    )


def _real(tokens: Tokens, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index of the real queries and keys of a sequence, and their positions."""
    t = b if len(tokens.q_real) > 1 else 0
    rows, keys = tokens.q_real[t].nonzero()[:, 0], tokens.k_real[t].nonzero()[:, 0]
    q_pos, k_pos = (x[t if len(x) > 1 else 0] for x in (tokens.q_pos, tokens.k_pos))
    first = k_pos[keys[:1]]
    q_at = q_pos[rows] - first
    seeing = q_at >= 0  # with more queries than keys, the first ones see none
    return rows[seeing], keys, q_at[seeing], k_pos[keys] - first


def _tokens(q: Tensor, k: Tensor, ctx: Context, owner: str) -> Tokens:
    tokens = tokens_of(q, k, ctx)
    if not tokens.causal or not is_causal_or_full(ctx, tokens):
        raise InputError(
            f"{owner} is defined for causal attention, padding apart, but the mask is another one "
            "(no mask is everything); give Context(mask=causal()), or use a method that keeps to "
            "any mask, such as block-sparse."
        )
    if ctx.bias is not None:
        raise InputError(f"{owner} doesn't look at biases, so it would choose wrongly with one.")
    return tokens
