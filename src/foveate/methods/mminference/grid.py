"""Grid: every stride-th column and row, as video tokens have them, found in the input itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.mminference.lines import layout_of_parts
from foveate.methods.mminference.prefill import ProblemPattern
from foveate.methods.mminference.problem import Part, Problem, problems
from foveate.ops import Layout, window
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import TILE
from foveate.parts.context import Context


class Found(NamedTuple):
    """Of each head: stride sigma, phase s and how clearly it stands out, each (H,)."""

    stride: Tensor
    phase: Tensor
    z: Tensor


_STRIDES = 64  # that are scored at once


def z_scores(columns: Tensor, stride: int) -> Tensor:
    """How far the mean of each phase lies above chance: (H, stride).

        z = (mean over the phase's columns - mean of all) * sqrt(columns of the phase) / std

    Args:
        columns: (H, n) scores by number of the token.
        stride: sigma.
    """
    count = columns.shape[1]
    spare = -count % stride
    folded = torch.nn.functional.pad(columns, (0, spare)).unflatten(1, (-1, stride)).sum(1)
    each = (count - torch.arange(stride, device=columns.device) + stride - 1) // stride
    mean, std = columns.mean(1, keepdim=True), columns.std(1, correction=0, keepdim=True)
    tiny = torch.finfo(columns.dtype).tiny
    each = each.to(columns.dtype)
    return (folded / each.clamp_min(1) - mean) * each.sqrt() / std.clamp_min(tiny)


@torch.no_grad()  # a choice, which has no gradient
def search_stride(columns: Tensor, strides: list[int]) -> Found:
    """The stride and phase of the highest z, for each head; of equal ones the shorter stride.

    As `z_scores` for each stride; what doesn't depend on it is made once.
    """
    heads, count = columns.shape
    device, widest = columns.device, max(strides)
    best = Found(
        torch.ones(heads, dtype=torch.int64, device=device),
        torch.zeros(heads, dtype=torch.int64, device=device),
        columns.new_full((heads,), -torch.inf),
    )
    mean = columns.mean(1)[:, None, None]
    std = columns.std(1, correction=0)[:, None, None].clamp_min(torch.finfo(columns.dtype).tiny)
    padded = torch.nn.functional.pad(columns, (0, widest))
    phases = torch.arange(widest, device=device)
    for some in (strides[i : i + _STRIDES] for i in range(0, len(strides), _STRIDES)):
        sums = columns.new_zeros(heads, len(some), max(some))
        for i, stride in enumerate(some):
            rows = -(-count // stride)
            folded = padded[:, : rows * stride].unflatten(1, (rows, stride))
            torch.sum(folded, 1, out=sums[:, i, :stride])
        each = torch.tensor(some, device=device)[:, None]
        own = (count - phases[: max(some)] + each - 1) // each
        own = own.to(columns.dtype).clamp_min(0)
        z = (sums / own.clamp_min(1) - mean) * own.sqrt() / std
        z, phase = z.masked_fill(phases[: max(some)] >= each, -torch.inf).max(2)
        top, at = z.max(1)
        better = top > best.z
        best = Found(
            torch.where(better, each[at, 0], best.stride),
            torch.where(better, phase.gather(1, at[:, None])[:, 0], best.phase),
            torch.where(better, top, best.z),
        )
    return best


@dataclass(frozen=True)
class Grid(ProblemPattern):
    """Query i sees key j <= i on a line of the grid, or in its own block of 64 tokens.

    Lines: columns j mod sigma = s (`vertical`), rows i mod sigma = s, which see all (`horizontal`),
    and diagonals (i - j) mod sigma = t (`slash`). sigma, s and t are found, per sequence and query
    head, in the attention of the last `last` queries to all keys before them: the stride and phase
    whose columns stand out most by z-score (`z_scores`). Tokens are numbered from the first one of
    the sequence, or, within a boundary pattern, of the modality. Rows on and off the lines, and the
    columns, are put side by side; causality rests on original positions. The last queries choose
    for all, so the choice isn't causal. Decoding is dense. arXiv 2504.16083, algorithm 1.

    The paper leaves open how columns are reduced; a plain mean prefers multiples of the stride, a
    sum its divisors.

    Attributes:
        stride: sigma, such as the tokens of a frame; None searches for it.
        max_stride: longest one that is searched (1024).
        vertical: whether columns are on.
        horizontal: whether rows are on; their phase is that of the columns.
        slash: whether diagonals are on.
        last: queries that choose (64).

    Raises:
        InputError: a field that doesn't fit, or a mask that isn't causal.
    """

    stride: int | None = None
    max_stride: int = 1024
    vertical: bool = True
    horizontal: bool = True
    slash: bool = False
    last: int = 64

    def __post_init__(self) -> None:
        if self.stride is not None:
            whole("Grid", "stride", self.stride, least=1)
        whole("Grid", "max_stride", self.max_stride, least=1)
        whole("Grid", "last", self.last, least=1)
        if not (self.vertical or self.horizontal or self.slash):
            raise InputError("Grid: turn on at least one of vertical, horizontal and slash.")

    @override
    def _keeps_all(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        return self.stride == 1

    def find(self, problem: Problem) -> Found:
        """Stride and phase of each head, in the problem's own numbering.

        From the columns if any line rests on them, else from the distances in those numbers.
        """
        if self.vertical or self.horizontal:
            own = problem.k_number >= 0
            before = own & (problem.k_at <= int(problem.q_at[-1]) - self.last)
            columns = problem.column_sums[:, before]
            # Numbers of one modality count up by one, from the first.
            shift = int(problem.k_number[before][0]) if bool(before.any()) else 0
        else:
            columns, shift = problem.number_sums[:, self.last :], self.last
        if columns.shape[1] == 0:
            zero = torch.zeros(problem.heads, dtype=torch.int64, device=columns.device)
            return Found(zero + (self.stride or 1), zero, columns.new_zeros(problem.heads))
        longest = min(self.max_stride, max(1, columns.shape[1] // 2))
        strides = list(range(2, longest + 1)) or [1]
        found = search_stride(columns, strides if self.stride is None else [self.stride])
        return found._replace(phase=(found.phase + shift) % found.stride)

    @override
    def parts(self, problem: Problem) -> list[list[Part]]:
        if not len(problem.q_at) or not len(problem.k_at):
            return [[] for _ in range(problem.heads)]
        found = self.find(problem)
        made = []
        for h in range(problem.heads):
            stride, phase = int(found.stride[h]), int(found.phase[h])
            diagonal = self._diagonal(problem, h, stride) if self.slash else None
            made.append(self.parts_of(problem, stride, phase, diagonal))
        return made

    def _diagonal(self, problem: Problem, h: int, stride: int) -> int:
        if not (self.vertical or self.horizontal):
            return int(self.find(problem).phase[h])
        far = problem.number_sums[h : h + 1, self.last :]
        if far.shape[1] < stride:
            return 0
        return (int(z_scores(far, stride)[0].argmax()) + self.last) % stride

    def parts_of(
        self, problem: Problem, stride: int, phase: int, diagonal: int | None = None
    ) -> list[Part]:
        """The parts of one head whose grid is known."""
        own = problem.k_number >= 0
        column = own & (problem.k_number % stride == phase) & self.vertical
        row = (problem.q_number % stride == phase) & self.horizontal
        every = torch.arange(len(problem.keys), device=own.device)
        block = window(0, 0, block=TILE)
        on, off = row.nonzero()[:, 0], (~row).nonzero()[:, 0]
        parts = [Part(off, every, column, block), Part(on, every)]
        if diagonal is None:
            return parts
        q_class = problem.q_number[off] % stride
        for kind in q_class.unique().tolist():
            here = own & ~column & (problem.k_number % stride == (kind - diagonal) % stride)
            parts.append(Part(off[q_class == kind], every[here], band=~block))
        return parts

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        made = [[(p, self.parts(p))] for p in problems(q, k, ctx, self.last, "grid")]
        return layout_of_parts(made, (q.shape[2], k.shape[2]), TILE, q.device)
