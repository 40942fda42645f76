"""Chunks scored and copied back to tokens, and the tokens that each block of queries keeps.

    Kr_c = sqrt(n_c) mean_{j in c} kbar_j        Qr_m = sqrt(n_m) mean_{i in m} qbar_i
    Sc = Qr Kr^T,   St[m, j] = Sc[m, chunk(j)],  M[m] = TopK(St[m], N_b) with local tokens forced in

qbar and kbar are means over heads. The square root makes the noise of a score independent of the
chunk's length: for independent noise of unit variance in each key a mean has n^-1/2, a sum n^1/2.
DHSA, arXiv 2510.24606.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["norm", "mean", "sum", "max"]
POOLINGS: tuple[Pooling, ...] = ("norm", "mean", "sum", "max")


def pooled(x: Tensor, bounds: Tensor, pooling: Pooling = "norm") -> Tensor:
    """Vectors x (L, d) to one for each chunk, (Nc, d), in x's dtype."""
    counts = bounds.diff().to(x.device)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts)
    made = x.new_zeros(len(counts), x.shape[1])
    if pooling == "max":
        at = owner[:, None].expand_as(x)
        return made.scatter_reduce_(0, at, x, "amax", include_self=False)
    return scaled(made.index_add_(0, owner, x), counts, pooling)


def scaled(sums: Tensor, counts: Tensor, pooling: Pooling) -> Tensor:
    """Sums (n, d) of so many vectors each (n,), as `pooling` says: sum / sqrt(n) is "norm"."""
    if pooling == "sum":
        return sums
    n = counts.clamp_min(1).to(sums.dtype)[:, None]
    return sums / (n.sqrt() if pooling == "norm" else n)


def select(
    scores: Tensor,
    bounds: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    budget: int,
    local: int,
    sinks: int = 0,
) -> Tensor:
    """The tokens that each row keeps: bool (N, L).

    Of the allowed tokens [start, end) the last `local` are kept, and of the others the best by
    St until `budget` are; tokens of one chunk tie and are taken in order, so the last chunk may be
    cut. Then the first `sinks` of what is kept are replaced by the first `sinks` allowed tokens.

    Args:
        scores: (N, Nc), Sc.
        bounds: (Nc + 1,) boundaries.
        start: (N,) first allowed token.
        end: (N,) after the last allowed token.
        budget: N_b, tokens kept by a row, all included.
        local: the most recent tokens.
        sinks: the first tokens ("global" in the paper).
    """
    device = scores.device
    bounds = bounds.to(device)
    length = int(bounds[-1])
    recent = torch.maximum(end - min(local, budget), start)[:, None]
    start, end = start[:, None], end[:, None]
    low = torch.maximum(bounds[:-1], start)  # (N, Nc): where a chunk's candidates begin
    room = (torch.minimum(bounds[1:], recent) - low).clamp_min(0)
    rank = torch.where(room > 0, scores, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    sorted_room = room.gather(1, rank)
    before = sorted_room.cumsum(1) - sorted_room
    left = (budget - (end - recent)).clamp_min(0)
    taken = torch.minimum((left - before).clamp_min(0), sorted_room)
    count = torch.zeros_like(taken).scatter_(1, rank, taken)
    places = torch.arange(length, device=device)
    chunk = torch.repeat_interleave(
        torch.arange(len(bounds) - 1, device=device), bounds.diff(), output_size=length
    )
    kept = (places >= low[:, chunk]) & (places < (low + count)[:, chunk])
    kept |= (places >= recent) & (places < end)
    if not sinks:
        return kept
    first = (places >= start) & (places < torch.minimum(start + sinks, end))
    return (kept & (kept.cumsum(1) > sinks)) | first
