"""Pluecker coordinates of pairs of tokens, and their mean over several offsets.

    p_ab(u, v) = u_a v_b - u_b v_a,   a < b, row-major in (a, b)              c = r (r - 1) / 2
    phat       = p / max(|p|, eps)    (or p / sqrt(|p|^2 + eps^2))
    s_t        = sum over offsets d of w_td phat(z_t, z_{t-d})

Parallel vectors span no plane: p is 0, and phat too. In floating point what is left of p there is
rounding, which must not be made a plane of length 1 (a run of one token would have planes that
differ between decoding and the whole sequence), nor be divided by eps in the backward. So phat is
0, and a constant, wherever |p| <= rounding |u| |v|.

`mean_features` never holds more than a few hundred rows of any single pair's features, forward or
backward: what is kept for the backward is z alone, so memory is O(L c) whatever the offsets are.

Source: arXiv 2512.19428, section 3; steps 2 and 4 of the algorithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_NUMBERS = 1 << 18  # features of all sequences, at once: so many stay in a core's cache


@lru_cache(maxsize=32)
def _pairs(rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    found = [(a, b) for a in range(rank) for b in range(a + 1, rank)]
    return tuple(a for a, _ in found), tuple(b for _, b in found)


def pair_index(rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices a and b of all pairs a < b, row-major: (c,) int64 each."""
    first, second = _pairs(rank)
    return torch.tensor(first, device=device), torch.tensor(second, device=device)


def plucker(u: Tensor, v: Tensor) -> Tensor:
    """The 2x2 minors of the plane of u and v: (..., r) each -> (..., r (r - 1) / 2).

    The definition; `mean_features` is what runs.
    """
    a, b = pair_index(u.shape[-1], u.device)
    return u[..., a] * v[..., b] - u[..., b] * v[..., a]


def normalised(p: Tensor, eps: float = 1e-8, smooth: bool = False) -> Tensor:
    """phat: p over its length; `smooth` has a bounded gradient where p is 0."""
    return p / _length(p.square().sum(-1, keepdim=True), eps, smooth)


def _length(square: Tensor, eps: float, smooth: bool) -> Tensor:
    return (square + eps * eps).sqrt() if smooth else square.sqrt().clamp_min(eps)


def rounding_of(dtype: torch.dtype) -> float:
    """The sine of an angle that is told from 0 where vectors were computed in this dtype."""
    return float(min(32 * torch.finfo(dtype).eps, 2**-5))


def mean_features(
    z: Tensor, start: int, shifts: Sequence[int], weight: Tensor, eps: float, smooth: bool,
    rounding: float | None = None,
) -> Tensor:  # fmt: skip
    """sum_d weight_d phat(z_t, z_{t-d}) for the tokens t from `start` on.

    Args:
        z: (B, N, r), fp32 or wider: the tokens before `start` and all that are asked for.
        start: index of the first token that is asked for.
        shifts: the offsets d; negative ones look ahead.
        weight: (len(shifts), 1 or B, N - start), 0 where the pair doesn't count (as it must be
            where z_{t-d} isn't there).
        eps, smooth: as in `normalised`.
        rounding: the sine of the angle below which vectors are parallel; None is that of z's dtype,
            see `rounding_of`.

    Returns:
        (B, N - start, r (r - 1) / 2), differentiable in z.
    """
    least = rounding_of(z.dtype) if rounding is None else rounding
    out: Tensor = _MeanFeatures.apply(z, start, tuple(shifts), weight, eps, smooth, least)
    return out


class _Rows:
    """Some rows that are asked for, with all that they look at; zeros outside of the sequence."""

    def __init__(self, z: Tensor, start: int, shifts: Sequence[int]) -> None:
        self.back, self.ahead = max(0, *shifts), max(0, *(-d for d in shifts))
        self.padded = functional.pad(z, (0, 0, self.back, self.ahead))
        self.norms = self.padded.norm(dim=-1, keepdim=True)
        self.start = start
        self.pairs = pair_index(z.shape[-1], z.device)
        self.step = max(16, _NUMBERS // max(1, len(z) * len(self.pairs[0])))

    def span(self, low: int, high: int) -> slice:
        """Rows of the padded z that the tokens low ... high - 1 look at."""
        return slice(self.start + low, self.start + high + self.back + self.ahead)

    def sides(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """z_a and z_b for all pairs: (B, rows of the span, c)."""
        some = self.padded[:, self.span(low, high)]
        return some.index_select(2, self.pairs[0]), some.index_select(2, self.pairs[1])

    def parallel(
        self, square: Tensor, low: int, own: slice, other: slice, rounding: float
    ) -> Tensor:
        """Where |p|^2 of the rows `own` and `other` of a span is rounding: (B, rows, 1) bool."""
        norms = self.norms[:, self.start + low :]
        return square <= (rounding * norms[:, own] * norms[:, other]).square()


class _MeanFeatures(torch.autograd.Function):
    """See `mean_features`."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, start: int, shifts: tuple[int, ...], weight: Tensor, eps: float,
        smooth: bool, rounding: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(z, weight)
        ctx.options = (start, shifts, eps, smooth, rounding)
        rows = _Rows(z, start, shifts)
        batch, count = len(z), z.shape[1] - start
        out = z.new_zeros(batch, count, len(rows.pairs[0]))
        for low in range(0, count, rows.step):
            high = min(count, low + rows.step)
            za, zb = rows.sides(low, high)
            own = slice(rows.back, rows.back + high - low)
            for d, w in zip(shifts, weight):
                other = slice(own.start - d, own.stop - d)
                p = za[:, own] * zb[:, other]
                p -= zb[:, own] * za[:, other]
                square = p.square().sum(-1, keepdim=True)
                factor = w[:, low:high, None] / _length(square, eps, smooth)
                flat = rows.parallel(square, low, own, other, rounding)
                out[:, low:high] += p.mul_(factor.masked_fill(flat, 0.0))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weight = ctx.saved_tensors
        start, shifts, eps, smooth, rounding = ctx.options
        rows = _Rows(z, start, shifts)
        count = z.shape[1] - start
        found = torch.zeros_like(rows.padded)
        index = torch.arange(z.shape[2], device=z.device)
        into_a, into_b = ((pair[:, None] == index).to(z.dtype) for pair in rows.pairs)
        for low in range(0, count, rows.step):
            high = min(count, low + rows.step)
            za, zb = rows.sides(low, high)
            da, db = torch.zeros_like(za), torch.zeros_like(zb)
            own = slice(rows.back, rows.back + high - low)
            for d, w in zip(shifts, weight):
                other = slice(own.start - d, own.stop - d)
                p = za[:, own] * zb[:, other]
                p -= zb[:, own] * za[:, other]
                square = p.square().sum(-1, keepdim=True)
                length = _length(square, eps, smooth)
                flat = rows.parallel(square, low, own, other, rounding)
                p /= length
                g = grad[:, low:high] * (w[:, low:high, None] / length).masked_fill(flat, 0.0)
                # Only what turns the plane counts; a clamped length is a constant.
                along = (p * g).sum(-1, keepdim=True)
                if not smooth:
                    along = along.masked_fill(length <= eps, 0.0)
                g -= p * along
                da[:, own] += g * zb[:, other]
                db[:, own] -= g * za[:, other]
                db[:, other] += g * za[:, own]
                da[:, other] -= g * zb[:, own]
            found[:, rows.span(low, high)] += da @ into_a + db @ into_b
        found = found[:, rows.back : rows.back + z.shape[1]]
        return found, None, None, None, None, None, None
