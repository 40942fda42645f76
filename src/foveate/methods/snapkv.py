"""SnapKV: after the prompt, each head keeps the keys that the prompt's last queries attend to.

    c_j = sum over i in the window of A_ij,  j before the window;  c = pool(c) along j

The window is the prompt's last queries; the keys with the highest c stay, beside the window's own.
Li et al. 2024, arXiv 2404.14469; sections 3.1 and 6 of the survey of sinks, arXiv 2604.10098.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.context import Context
from foveate.parts.estimate import received
from foveate.parts.eviction import EvictingCache, EvictionPolicy, of_group
from foveate.parts.tokens import tokens_of

Pooling = Literal["mean", "max"]


@dataclass(frozen=True)
class SnapKV(EvictionPolicy):
    """Dense attention; then the cache keeps `budget` keys of the prompt, in each head its own.

    A key head's c is the mean over the query heads that share it. Pooling keeps neighbours of a key
    that counts, which often complete it. Decoding appends: the cache then grows by one key a token.
    A prompt that comes in chunks, or a later turn, is cut after each of them by its own window.

    Attributes:
        budget: keys that are kept, the window and `sinks` among them (paper: 1024 to 4096).
        window: last queries of the prompt, that choose, and whose keys are kept (16 to 64).
        kernel: keys that are pooled, odd (5 or 7); 1 is none.
        pooling: "mean" counts zeros beyond the ends; or "max".
        sinks: first tokens that are always kept (none in the paper: they keep themselves).

    Raises:
        InputError: a field that doesn't fit, or padding that isn't on the left.
    """

    budget: int = 1024
    window: int = 32
    kernel: int = 5
    pooling: Pooling = "mean"
    sinks: int = 0

    def __post_init__(self) -> None:
        for name, least in (("budget", 1), ("window", 1), ("kernel", 1), ("sinks", 0)):
            whole("SnapKV", name, getattr(self, name), least=least)
        if self.kernel % 2 == 0:
            raise InputError(f"SnapKV(kernel={self.kernel}): expected an odd number.")
        if self.pooling not in get_args(Pooling):
            raise InputError(f"SnapKV(pooling={self.pooling!r}): expected mean or max.")
        if self.window + self.sinks > self.budget:
            raise InputError(
                f"SnapKV(budget={self.budget}): window={self.window} and sinks={self.sinks} are "
                "part of the budget; give at least their sum."
            )

    @property
    def reserved(self) -> str:
        """What is kept whatever it scores."""
        first = f"first {self.sinks:,} tokens, " if self.sinks else ""
        return f"{first}last {self.window:,} tokens of the prompt, and all that is decoded"

    def scores(self, q: Tensor, k: Tensor, lse: Tensor, ctx: Context) -> Tensor:
        """Pooled c of the keys before the window: (B, Hkv, n - window), fp32."""
        tokens = tokens_of(q, k, ctx)
        sums = received(q, k, lse, ctx, tokens, self.window)[..., : k.shape[2] - self.window]
        c = of_group(sums, k.shape[1])
        if self.kernel == 1:
            return c
        half = self.kernel // 2
        if self.pooling == "max":
            most: Tensor = torch.nn.functional.max_pool1d(c, self.kernel, 1, half)
            return most
        return torch.nn.functional.avg_pool1d(c, self.kernel, 1, half)

    @override
    def evict(self, q: Tensor, k: Tensor, lse: Tensor, ctx: Context, cache: EvictingCache) -> None:
        if q.shape[2] == 1 or len(cache) <= self.budget:
            return
        before = self.scores(q, k, lse, ctx)
        rank = torch.nn.functional.pad(before, (0, self.window), value=torch.inf)
        if self.sinks:
            first = cache.positions < (cache.pads + self.sinks)[:, None, None]
            rank = rank.masked_fill(first, torch.inf)
        cache.keep(rank, self.budget)
