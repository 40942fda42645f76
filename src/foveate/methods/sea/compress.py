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
_EPS = 1e-4


def bins_of(keys: Tensor, seen: Tensor, width: int, jitter: Tensor | None = None) -> Tensor:
    """b, int64, of keys and of how many keys the row sees (which broadcast); keys behind read K - 1.

    Args:
        keys: integers from 0.
        seen: n_t, integers, at least 1.
        width: K.
        jitter: added to j, as `keys`.
    """  # fmt: skip
    at = keys.double() + 0.5
    if jitter is not None:
        at = at + jitter
    return (at / seen * width - _EPS).floor().long().clamp(0, width - 1)


def firsts(seen: Tensor, width: int) -> Tensor:
    """(..., K + 1) first key of each bin, and n_t at the end; seen (...) integers."""
    bins = torch.arange(width, device=seen.device)
    start = ((bins + _EPS) * (seen[..., None].double() / width) - 0.5).ceil().long()
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

    Args:
        probs: (B, H, L, K), the estimate.
        budget: as `budgets` gives it: (B or 1, L) by row, or (B or 1,) by sequence.
        group: as in `budgets`.
        real: (B, L) bool; False keeps nothing.
    """
    batch, heads, length, width = probs.shape
    probs = probs.detach()
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


def _best(flat: Tensor, budget: Tensor) -> Tensor:
    """The `budget` (...) largest of each row of flat (..., N), bool."""
    most = int(budget.max())
    width = flat.shape[-1]
    if most >= width:
        order = flat.sort(dim=-1, descending=True, stable=True).indices
    else:
        # The cut is at each row's own value; of those equal to it the first are taken.
        values = flat.topk(most, -1).values
        cut = values.gather(-1, (budget - 1)[..., None])
        above = flat > cut
        ties = flat == cut
        spare = budget[..., None] - above.sum(-1, keepdim=True)
        return above | (ties & (ties.cumsum(-1) <= spare))
    chosen = torch.arange(width, device=flat.device) < budget[..., None]
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


def stretched(x: Tensor, keys: int, seen: Tensor, jitter: Tensor | None = None) -> Tensor:
    """x (B, H, n, K) at every key of rows that see `seen` (n,) or (B, n) keys: (B, H, n, keys)."""
    at = torch.arange(keys, device=x.device)
    rows = seen if seen.dim() == 2 else seen[None]
    index = bins_of(at, rows.clamp_min(1)[..., None], x.shape[-1], jitter)
    return x.gather(3, index[:, None].expand(x.shape[0], x.shape[1], -1, -1))
