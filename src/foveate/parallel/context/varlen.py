"""Packed sequences on ranks, in the form that variable-length kernels take: cu_seqlens for each.

For all-gather with contiguous shards and causal documents: rank r has queries r S / N ... and needs
the keys from the start of its first query's document to its last query, one stretch of the gathered
keys. Bottom-right alignment does the rest: the first piece's queries are the last of its keys. As
in zhuzilin/ring-flash-attention's llama3 form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole, whole_list


class Varlen(NamedTuple):
    """What a variable-length causal kernel is told on one rank.

    cu_q, cu_k: (n + 1,) int32 boundaries of its documents' pieces, among its queries and among the
    keys of `keys`; keys: the stretch of the gathered keys that it needs.
    """

    cu_q: Tensor
    cu_k: Tensor
    keys: slice


def varlen(cu_seqlens: Sequence[int] | Tensor, ranks: int, rank: int) -> Varlen:
    """The metadata of one rank, causal documents in contiguous equal shares.

    Raises:
        InputError: N doesn't divide the length, or there is no such rank.
    """
    bounds = whole_list("varlen", "cu_seqlens", cu_seqlens)
    ranks = whole("varlen", "ranks", ranks, least=1)
    if not 0 <= rank < ranks or bounds[-1] % ranks:
        raise InputError(
            f"varlen(rank={rank}, ranks={ranks}): expected a rank below the number of ranks, which "
            f"must divide the {bounds[-1]} tokens."
        )
    share = bounds[-1] // ranks
    lo, hi = rank * share, (rank + 1) * share
    mine = [(a, b) for a, b in zip(bounds, bounds[1:]) if a < hi and b > lo]
    first = mine[0][0] if mine else lo
    ends = [min(b, hi) for _, b in mine]
    cu_q = torch.tensor([0, *(e - lo for e in ends)], dtype=torch.int32)
    cu_k = torch.tensor([0, *(e - first for e in ends)], dtype=torch.int32)
    return Varlen(cu_q, cu_k, slice(first, hi))
