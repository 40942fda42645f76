"""Learnt distances inside clusters: embeddings on keys and values, clipped at the longest.

    score_ij = scale q_i . (k_j + r^K_d),   out_i = sum_j p_ij (v_j + r^V_d)
    d = min(R - 1, slots)

where slots counts the members that stand between, as the released code of the Routing Transformer
does (Shaw et al. 2018, arXiv 1803.02155, equations 3 and 4, with the cluster as the sequence). The
scores of a cluster are held as a whole: w x w numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.methods.routing_transformer.clusters import Clusters, pick


class Embeddings(NamedTuple):
    """Of distances, for each query head: key (H, R, D), value (H, R, Dv)."""

    key: Tensor
    value: Tensor


def attend_clusters(
    q: Tensor, k: Tensor, v: Tensor, clusters: Clusters, table: Embeddings, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each cluster's rows.

    Args:
        q, k, v: (B, H, L, D), (B, H, L, D), (B, H, L, Dv), keys being the queries.
        clusters: rows and keys are the same members, in rising order.
        table: embeddings.
        scale: factor on the scores.

    Returns:
        out (B, H, C * R, Dv), and which rows saw a key, bool (B, H, C * R).
    """
    rows, keys, first, last, _ = clusters
    batch, heads, count, height = rows.shape
    steps = torch.arange(height, device=q.device)
    member = (steps <= steps[:, None]) & (steps[:, None] < last[..., None, :])
    seen = member & (steps[:, None] >= first[..., None, :])
    distance = member.sum(-1, keepdim=True) - member.cumsum(-1)
    wide = [
        pick(x, rows).to(torch.promote_types(x.dtype, torch.float32)).unflatten(2, (count, height))
        for x in (q, k, v)
    ]
    out = attend(wide[0], wide[1], wide[2], seen, distance, table, scale)
    saw = seen.any(-1) & (rows >= 0)
    return out.to(v.dtype).reshape(batch, heads, count * height, -1), saw.flatten(2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, distance: Tensor, table: Embeddings, scale: float
) -> Tensor:
    """The formula above: q (B, H, C, n, D), k, v (.., m, ..), seen and distance (.., n, m)."""
    longest = table.key.shape[-2] - 1
    distance = distance.clamp(0, longest)
    by_distance = q @ table.key.to(q.dtype)[:, None].mT  # (B, H, C, n, R)
    scores = scale * (q @ k.mT + by_distance.gather(-1, distance))
    scores = scores.masked_fill(~seen, -torch.inf)
    empty = ~seen.any(-1, keepdim=True)
    probs = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(~seen, 0.0)
    shares = torch.zeros_like(by_distance).scatter_add(-1, distance, probs)
    return probs @ v + shares @ table.value.to(v.dtype)[:, None]
