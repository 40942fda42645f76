"""H2O: the cache keeps the newest keys and those that have received the most attention so far.

    score_j = sum over all queries i so far of A_ij

After each step the key with the lowest score goes, the newest apart. Zhang et al. 2023, arXiv
2306.14048; sections 3.1 and 6 of the survey of sinks, arXiv 2604.10098.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.context import Context
from foveate.parts.estimate import received
from foveate.parts.eviction import PADDING, EvictingCache, EvictionPolicy, of_group
from foveate.parts.tokens import tokens_of


@dataclass(frozen=True)
class H2O(EvictionPolicy):
    """Dense attention over the cache, which is then cut to `recent` + `heavy` keys, by head.

    A key head's score is the mean over the query heads that share it. The scores of a prompt take
    a second pass over its attention. The cache never holds more than the budget between two calls.

    Attributes:
        heavy: keys of the highest score, `sinks` among them (paper: a tenth of the prompt).
        recent: newest keys, that are always kept (likewise).
        sinks: first tokens that are always kept (none in the paper: they keep themselves).

    Raises:
        InputError: a field that doesn't fit, or padding that isn't on the left.
    """

    heavy: int = 512
    recent: int = 512
    sinks: int = 0

    def __post_init__(self) -> None:
        for name, least in (("heavy", 0), ("recent", 1), ("sinks", 0)):
            whole("H2O", name, getattr(self, name), least=least)
        if self.sinks > self.heavy:
            raise InputError(
                f"H2O(heavy={self.heavy}): sinks={self.sinks} are part of it; give at least as "
                "many."
            )

    @property
    def reserved(self) -> str:
        """What is kept whatever it scores."""
        first = f"first {self.sinks:,} tokens, " if self.sinks else ""
        return f"{first}last {self.recent:,} tokens"

    @override
    def evict(self, q: Tensor, k: Tensor, lse: Tensor, ctx: Context, cache: EvictingCache) -> None:
        if q.shape[2] == 1:
            sums = _one_row(q, k, lse, ctx, cache)
        else:
            sums = received(q, k, lse, ctx, tokens_of(q, k, ctx))
        cache.scores.add_(of_group(sums, k.shape[1]).to(cache.scores.dtype))
        size = self.heavy + self.recent
        if len(cache) <= size:
            return
        at = cache.positions
        forced = at >= cache.seen - self.recent
        if self.sinks:
            forced |= at < (cache.pads + self.sinks)[:, None, None]
        cache.keep(cache.scores.masked_fill(forced, torch.inf), size)


def _one_row(q: Tensor, k: Tensor, lse: Tensor, ctx: Context, cache: EvictingCache) -> Tensor:
    """Attention of the newest query, which sees all that isn't padding: (B, Hq, n)."""
    work = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[3] ** -0.5 if ctx.scale is None else ctx.scale
    grouped = (q[:, :, 0].to(work) * scale).unflatten(1, (k.shape[1], -1))
    scores = (grouped @ k.to(work).mT).flatten(1, 2)
    if ctx.softcap is not None:
        scores = ctx.softcap * torch.tanh(scores / ctx.softcap)
    if ctx.bias is not None:
        scores = scores + ctx.bias.expand(-1, q.shape[1], 1, -1)[:, :, 0].to(work)
    if not cache.padded:
        return scores.sub_(lse).exp_()
    # A query that is padding adds nothing, and padding receives nothing.
    found = torch.exp(scores - lse.masked_fill(lse == -torch.inf, torch.inf))
    nothing = (cache.positions == PADDING).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return found.masked_fill(nothing, 0.0)
