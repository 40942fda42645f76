"""Queries and keys around common centroids: large entries that lie anywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def clusters(n: int, centroids: int, dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, 1, n, dim): around the same unit centroids, values around one for each."""
    centre = torch.nn.functional.normalize(torch.randn(centroids, dim), dim=-1)
    meaning = torch.randn(centroids, dim)
    mine, theirs = torch.randint(centroids, (n,)), torch.randint(centroids, (n,))
    q, k = (4 * centre[at] + 0.3 * torch.randn(n, dim) for at in (mine, theirs))
    v = meaning[theirs] + 0.3 * torch.randn(n, dim)
    return q[None, None], k[None, None], v[None, None]
