"""Abstractions of a span: one vector that stands for the queries, or keys, of its tokens.

    x_S = pool_{j in S} phi(x_j)

phi is the identity, relu, or deepsets (linear, then relu; one map for queries and one for keys,
shared by the heads); pool is the elementwise max, the mean or the sum. The paper's default is
identity-max, which has no parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.ops.errors import InputError

PHIS = ("identity", "relu", "deepsets")
POOLS = ("max", "mean", "sum")


def split_pooling(pooling: str) -> tuple[str, str]:
    """(phi, pool) of a text such as "identity-max".

    Raises:
        InputError: it isn't one.
    """
    phi, _, pool = str(pooling).partition("-")
    if phi not in PHIS or pool not in POOLS:
        raise InputError(
            f"Combiner(pooling={pooling!r}): expected one of {', '.join(PHIS)}, a dash, and one of "
            f"{', '.join(POOLS)}, such as 'identity-max'."
        )
    return phi, pool


class Pooling(nn.Module):
    """Pools vectors of width D over the tokens of spans.

    Args:
        pooling: phi and pool, such as "identity-max".
        dim: D.
    """

    def __init__(self, pooling: str, dim: int) -> None:
        super().__init__()
        self.phi, self.pool = split_pooling(pooling)
        self.linear = nn.Linear(dim, dim) if self.phi == "deepsets" else None

    def features(self, x: Tensor) -> Tensor:
        """phi(x), x (..., D)."""
        if self.linear is not None:
            x = self.linear(x)
        return x if self.phi == "identity" else torch.relu(x)

    def over(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Pool x (..., n, D) over n to (..., D), of no token at all to 0.

        What is False in seen, broadcastable to (..., n), is left out.
        """
        x = self.features(x)
        if self.pool == "max":
            return _zeroed(x.amax(-2)) if seen is None else _zeroed(_hidden(x, seen).amax(-2))
        if seen is None:
            return x.mean(-2) if self.pool == "mean" else x.sum(-2)
        total = (x * seen[..., None]).sum(-2)
        if self.pool == "sum":
            return total
        return total / seen.sum(-1, keepdim=True).clamp_min(1)

    def prefixes(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Pool x (..., n, D) over its first 1, 2, ... n tokens: (..., n, D); as `over`."""
        x = self.features(x)
        if self.pool == "max":
            x = x if seen is None else _hidden(x, seen)
            return _zeroed(x.cummax(-2).values)
        x = x if seen is None else x * seen[..., None]
        total = x.cumsum(-2)
        if self.pool == "sum":
            return total
        if seen is None:
            return total / torch.arange(1, x.shape[-2] + 1, device=x.device, dtype=x.dtype)[:, None]
        return total / seen.cumsum(-1)[..., None].clamp_min(1)

    # -- one token after the other ---------------------------------------------------------------
    def joined(self, one: Tensor | None, two: Tensor) -> Tensor:
        """What is kept of the union of two spans; `kept` of a token is `features`, None is empty.

        A maximum of maxima; for mean and sum a sum of sums.
        """
        if one is None:
            return two
        return torch.maximum(one, two) if self.pool == "max" else one + two

    def kept(self, x: Tensor) -> Tensor:
        """What `joined` works on, of a span x (..., n, D): (..., D)."""
        x = self.features(x)
        return x.amax(-2) if self.pool == "max" else x.sum(-2)

    def finished(self, kept: Tensor, count: int) -> Tensor:
        """The abstraction, from what was kept of `count` tokens."""
        return kept / count if self.pool == "mean" else kept


def _hidden(x: Tensor, seen: Tensor) -> Tensor:
    return x.masked_fill(~seen[..., None], -torch.inf)


def _zeroed(x: Tensor) -> Tensor:
    """0 for -inf, which is the maximum of nothing."""
    return x.masked_fill(x == -torch.inf, 0.0)
