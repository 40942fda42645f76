"""From a compressed attention of fixed width K to keys, and which of its bins are kept.

Row t sees n_t keys; key j (from 0) of them reads the bin

    b(t, j) = clamp( floor( (j + 1/2) / n_t K - 1e-4 ), 0, K - 1 )

so that bin m holds the keys from ceil((m + 1e-4) n_t / K - 1/2) on: every row has a scale of its
own. The best bins are chosen within groups, so many that each query and head keeps about k keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUPS = ("query", "head", "batch", "causal_batch")
EPS = 1e-4


def bins_of(keys: Tensor, seen: Tensor, width: int, jitter: Tensor | None = None) -> Tensor:
    """Bin b, int64, of keys in rows that see so many keys; keys behind the last read K - 1.

    Args:
        keys: integers from 0.
        seen: n_t, integers, at least 1; broadcastable with keys.
        width: K.
        jitter: added to j, as `keys`.
    """
    at = keys.double() + 0.5
    if jitter is not None:
        at = at + jitter
    return (at / seen * width - EPS).floor().long().clamp(0, width - 1)


def firsts(seen: Tensor, width: int) -> Tensor:
    """(..., K + 1) first key of each bin, and n_t at the end; seen (...) integers."""
    bins = torch.arange(width, device=seen.device)
    start = ((bins + EPS) * (seen[..., None].double() / width) - 0.5).ceil().long()
    start = start.clamp(min=0)
    start = torch.cat((torch.zeros_like(start[..., :1]), start[..., 1:]), -1)
    return torch.cat((torch.minimum(start, seen[..., None]), seen[..., None]), -1)


def budgets(k: float, seen: Tensor, width: int, heads: int, group: str, rows: int) -> Tensor:
    """Bins to keep in each group, int64: to the nearest, at least 1, at most the group.

    Args:
        k: keys for each query and head.
        seen: (..., L) n_t by row, or for "head" and "batch" (...) n of the sequence.
        width: K.
        heads: H.
        group: "query" is a row of a head, "causal_batch" a row over all heads, "head" all rows
            (`rows` of them) of a head, "batch" all rows of all heads.
        rows: L.
    """
    many = {"query": 1, "causal_batch": heads, "head": rows, "batch": heads * rows}[group]
    wanted = (many * k * width / seen.double()).round().long()
    return wanted.clamp(1, many * width)


def keep_best(probs: Tensor, budget: Tensor, group: str, real: Tensor | None = None) -> Tensor:
    """Which bins are kept, bool (B, H, L, K); of equal ones the first (by head, row, bin).

    Neighbouring bins often are equal, since the CNN widens its image by repeating, but for the
    rounding of whichever kernel ran: probabilities are compared to a part in 4,096 (in float64, in
    2^36), so that decoding chooses as the full forward does.

    Args:
        probs: (B, H, L, K), the estimate.
        budget: as `budgets` gives it: (B or 1, L) by row, or (B or 1,) by sequence.
        group: as in `budgets`.
        real: (B, L) bool; False keeps nothing.
    """
    batch, heads, length, width = probs.shape
    probs = _rounded(probs.detach())
    if real is not None:
        probs = probs.masked_fill(~real[:, None, :, None], -1.0)
    if group == "query":
        flat, budget = probs, budget[:, None, :]
    elif group == "causal_batch":
        flat = probs.transpose(1, 2).flatten(2)
    elif group == "head":
        flat, budget = probs.flatten(2), budget[:, None]
    else:
        flat = probs.flatten(1)
    keep = _best(flat, budget.expand(flat.shape[:-1]))
    if group == "causal_batch":
        keep = keep.view(batch, length, heads, width).transpose(1, 2)
    keep = keep.reshape(batch, heads, length, width)
    return keep if real is None else keep & real[:, None, :, None]


def _rounded(x: Tensor) -> Tensor:
    """The same with fewer digits."""
    mantissa, exponent = torch.frexp(x)
    digits = float(2 ** (36 if x.dtype == torch.float64 else 12))
    return torch.ldexp((mantissa * digits).round() / digits, exponent)


def _best(flat: Tensor, budget: Tensor) -> Tensor:
    """The `budget` (...) largest of each row of flat (..., N), bool.

    Rows are taken together whose budgets are within a factor of two: the first rows of a causal
    estimate keep everything, the last ones little.
    """
    width = flat.shape[-1]
    rows, wanted = flat.reshape(-1, width), budget.reshape(-1)
    found = torch.zeros_like(rows, dtype=torch.bool)
    level = torch.frexp(wanted.double()).exponent
    for one in level.unique().tolist():
        at = (level == one).nonzero()[:, 0]
        found[at] = _cut(rows[at], wanted[at])
    return found.view(flat.shape)


def _cut(rows: Tensor, wanted: Tensor) -> Tensor:
    """The `wanted` (R,) largest of each of rows (R, N).

    They are what is above each row's own cut, and of those equal to it the first.
    """
    most = int(wanted.max())
    if int(wanted.min()) == rows.shape[1]:
        return torch.ones_like(rows, dtype=torch.bool)
    cut = rows.topk(most, -1).values.gather(1, (wanted - 1)[:, None])
    above, ties = rows > cut, rows == cut
    spare = wanted[:, None] - above.sum(1, keepdim=True)
    return above | (ties & (ties.cumsum(1) <= spare))


def stretched(x: Tensor, keys: int, seen: Tensor, jitter: Tensor | None = None) -> Tensor:
    """Read x (B, H, n, K) at every key of rows that see `seen` (n,) or (B, n): (B, H, n, keys)."""
    at = torch.arange(keys, device=x.device)
    rows = seen if seen.dim() == 2 else seen[None]
    index = bins_of(at, rows.clamp_min(1)[..., None], x.shape[-1], jitter)
    return x.gather(3, index[:, None].expand(x.shape[0], x.shape[1], -1, -1))
