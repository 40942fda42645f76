"""Additive biases that depend on how far a key is from a query, without an Lq x Lkv tensor.

A table holds one entry for each distance, key position minus query position; what lies beyond an
end takes the entry at that end (clipping: Shaw et al. 2018, arXiv:1803.02155, section 3.2). One row
for all queries is a relative bias, a row for each query (Transformer-XL, arXiv:1901.02860) a
query-relative one, of Lq x R entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops.errors import InputError


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """A bias by distance: b_ij = table[..., clip(j - i - first, 0, R - 1)], i and j positions.

    The last query stands at the last key, so i is its index plus Lkv - Lq.

    Attributes:
        table: (R,), (Hq, R), (1 or B, 1 or Hq, R) with one row for all queries, or
            (1 or B, 1 or Hq, Lq, R) with a row for each query. Differentiable.
        first: the distance, key minus query, of the table's first entry; at most 0 as a rule:
            -(Lkv - 1) for a causal table that reaches back to the first key.
    """

    table: Tensor
    first: int

    def __post_init__(self) -> None:
        if not isinstance(self.table, Tensor) or not self.table.is_floating_point():
            raise InputError("RelativeBias: table must be a floating-point tensor.")
        if not 1 <= self.table.dim() <= 4 or self.table.shape[-1] == 0:
            raise InputError(
                "RelativeBias: table must be (R,), (Hq, R), (B, Hq, R) or (B, Hq, Lq, R) with at "
                f"least one entry, got shape {tuple(self.table.shape)}."
            )
        if isinstance(self.first, bool) or not isinstance(self.first, int | torch.SymInt):
            raise InputError(f"RelativeBias: first={self.first!r} must be a whole number.")
        if isinstance(self.first, int) and abs(self.first) >= 1 << 31:
            raise InputError(f"RelativeBias: first={self.first} is no distance (below 2 ** 31).")

    def four(self) -> Tensor:
        """The table as (1 or B, 1 or Hq, 1 or Lq, R)."""
        table = self.table
        if table.dim() < 4:
            table = table.unsqueeze(-2)
        return table.reshape((1,) * (4 - table.dim()) + tuple(table.shape))


def alibi(slopes: Tensor, reach: int) -> RelativeBias:
    """-slope * |i - j|, for each query head (Press et al. 2022, arXiv:2108.12409).

    Args:
        slopes: (Hq,); those of the paper are `alibi_slopes(Hq)`. Differentiable.
        reach: the longest distance; max(Lq, Lkv) - 1 covers every pair. A fixed reach, such as the
            longest context, keeps compiled decoding from being traced anew.

    Returns:
        The bias, its table (Hq, 2 reach + 1) in fp32 at least: in half precision neighbouring
        distances would coincide.
    """
    if slopes.dim() != 1:
        raise InputError(f"alibi: slopes must be (Hq,), got shape {tuple(slopes.shape)}.")
    if reach < 0:
        raise InputError(f"alibi: reach={reach}: expected a distance of at least 0.")
    work = torch.promote_types(slopes.dtype, torch.float32)
    distance = torch.arange(-reach, reach + 1, device=slopes.device).abs().to(work)
    return RelativeBias(-slopes.to(work)[:, None] * distance, -reach)


def alibi_slopes(heads: int) -> Tensor:
    """The paper's slopes, (Hq,): 2 ** (-8 k / n) for k = 1 .. n, n the power of two up to Hq.

    Where Hq is no power of two the rest is every other slope of twice as many heads.
    """
    if heads < 1:
        raise InputError(f"alibi_slopes: heads={heads}: expected at least 1.")
    n = 1 << (heads.bit_length() - 1)
    own = 2.0 ** (-8.0 * torch.arange(1, n + 1) / n)
    more = 2.0 ** (-4.0 * torch.arange(1, 2 * n + 1, 2) / n)
    return torch.cat([own, more])[:heads]


def entries(first: int, count: int, queries: Tensor, keys: Tensor) -> Tensor:
    """The entry of each pair of positions: the shape that `queries` and `keys` broadcast to."""
    return (keys - queries - first).clamp(0, count - 1)


def spread_bias(
    bias: Tensor,
    first: int,
    q_len: int,
    kv_len: int,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """A relative bias (.., .., 1 or Lq, R) as the plain one that it stands for: (.., .., n, m).

    `rows` (n,) are indices of queries, `keys` (m,) of keys; None is all of them.
    """
    rows = torch.arange(q_len, device=bias.device) if rows is None else rows
    keys = torch.arange(kv_len, device=bias.device) if keys is None else keys
    at = entries(first, bias.shape[-1], (rows + kv_len - q_len)[:, None], keys)
    full = bias[:, :, rows] if bias.shape[2] > 1 else bias.expand(-1, -1, len(rows), -1)
    return full.gather(-1, at.expand(*full.shape[:2], -1, -1))
