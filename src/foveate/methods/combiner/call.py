"""One call of Combiner: its tokens in order from index 0, folded into the rows of a grid.

With padding on the left the tokens of each sequence are moved to the front, so that a partition
counts from the first real token. L tokens are then n rows of m columns, token r * m + c; a batch of
rows or of columns turns whatever happens within one of them into a small dense attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.ops import AttentionOutput, Layout, Mask, attention, causal, window
from foveate.parts.context import Context

CAUSAL, STRICT, OTHERS = causal(), causal() & ~window(0, 0), ~window(0, 0)


class Spans(NamedTuple):
    """Summaries that queries see as single keys.

    key (B, Hq, S, D), value (B, Hq, S, Dv), and how many tokens each stands for, (1 or B, S).
    """

    key: Tensor
    value: Tensor
    counts: Tensor


@dataclass
class Call:
    """Tokens and options of a call.

    Attributes:
        q, k, v: (B, Hq, L, D), (B, Hkv, L, D), (B, Hkv, L, Dv).
        causal: whether no token sees a later one.
        seen: (B, L) bool, False on padding, which stands at the end; None is all real. Only told
            where it matters: what is causal never sees the end.
        x: (B, L, dim), input of the layer, or None.
        ctx: whose scale, dropout and backend count.
        count_bias: whether a span's logit gets log of its length.
        memo: what direct tokens and spans share.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    seen: Tensor | None
    x: Tensor | None
    ctx: Context
    count_bias: bool = False
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """L."""
        return self.q.shape[2]

    @property
    def group(self) -> int:
        """Query heads of each key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    def each(self, x: Tensor) -> Tensor:
        """(B, Hkv, ...) -> (B, Hq, ...): spans are values of their own for each query head."""
        return x if self.group == 1 else x.repeat_interleave(self.group, 1)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask | None = None,
        *,
        seen: Tensor | None = None,
        bias: Tensor | None = None,
        layout: Layout | None = None,
    ) -> AttentionOutput:
        """The core op; seen hides keys, bias is added to their logits.

        Either is (B', Lk), (B', Hq, Lk) or (B', Hq, Lq, Lk).
        """
        if seen is not None:
            work = torch.promote_types(q.dtype, torch.float32)
            none = torch.zeros(seen.shape, dtype=work, device=q.device)
            bias = none.masked_fill(~seen, -torch.inf)
        if bias is not None and bias.dim() < 4:
            bias = bias[:, :, None] if bias.dim() == 3 else bias[:, None, None]
        ctx = self.ctx
        return attention(
            q, k, v, mask, layout=layout, scale=ctx.scale, dropout=ctx.dropout, backend=ctx.backend,
            bias=bias,
        )  # fmt: skip

    def span_bias(self, count: Tensor) -> Tensor | None:
        """Bias of spans by how many tokens they stand for, count (...): -inf for empty ones."""
        empty = count <= 0
        if not self.count_bias and not bool(empty.any()):
            return None
        work = torch.promote_types(self.q.dtype, torch.float32)
        if self.count_bias:
            return count.to(work).clamp_min(0).log()
        return torch.zeros(count.shape, dtype=work, device=count.device).masked_fill(
            empty, -torch.inf
        )

    def padded(self, multiple: int) -> Call:
        """The same with tokens behind the last one, up to a multiple; nobody real sees them."""
        spare = -self.length % multiple
        if not spare:
            return self
        seen = self.seen
        if not self.causal:
            batch = self.q.shape[0]
            seen = self.q.new_ones(batch, self.length).bool() if seen is None else seen
            seen = F.pad(seen, (0, spare))
        q, k, v = (F.pad(x, (0, 0, 0, spare)) for x in (self.q, self.k, self.v))
        x = None if self.x is None else F.pad(self.x, (0, 0, 0, spare))
        return Call(q, k, v, self.causal, seen, x, self.ctx, self.count_bias)

    def reversed(self) -> Call:
        """The same read from each sequence's last real token to its first."""
        index = self.reversal()
        q, k, v = (_picked(x, index) for x in (self.q, self.k, self.v))
        return Call(q, k, v, self.causal, self.seen, None, self.ctx, self.count_bias)

    def reversal(self) -> Tensor:
        """(1 or B, L): where token i goes; padding stays."""
        at = torch.arange(self.length, device=self.q.device)[None]
        if self.seen is None:
            return self.length - 1 - at
        back = self.seen.sum(1, keepdim=True) - 1 - at
        return torch.where(back >= 0, back, at)


def unreversed(out: AttentionOutput, call: Call) -> AttentionOutput:
    """Results of `call.reversed()` in the order of `call`."""
    index = call.reversal()
    return AttentionOutput(_picked(out.out, index), _picked(out.lse[..., None], index)[..., 0])


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """Take x (B, H, L, W) at index (1 or B, L) along L."""
    if len(index) == 1:
        return x[:, :, index[0]]
    return x.gather(2, index[:, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3]))


def turned(x: Tensor, start: Tensor) -> Tensor:
    """Turn x (B, H, L, W) so that each sequence's token start (B,) is the first one."""
    at = torch.arange(x.shape[2], device=x.device)
    return _picked(x, (at + start[:, None]) % x.shape[2])


# -- rows and columns ----------------------------------------------------------------------------
def folded(
    fold: Callable[[Tensor, int], Tensor], call: Call, m: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, k and v of a call by `rows` or by `columns`."""
    return fold(call.q, m), fold(call.k, m), fold(call.v, m)


def rows(x: Tensor, m: int) -> Tensor:
    """(B, H, n * m, W) -> (B * n, H, m, W), a batch entry for each row."""
    return x.unflatten(2, (-1, m)).transpose(1, 2).flatten(0, 1)


def columns(x: Tensor, m: int) -> Tensor:
    """(B, H, n * m, W) -> (B * m, H, n, W), a batch entry for each column."""
    return x.unflatten(2, (-1, m)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def from_rows(out: AttentionOutput, batch: int) -> AttentionOutput:
    """The way back from `rows`."""
    values, lse = (x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3) for x in out)
    return AttentionOutput(values, lse)


def from_columns(out: AttentionOutput, batch: int) -> AttentionOutput:
    """The way back from `columns`."""
    values = out.out.unflatten(0, (batch, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    lse = out.lse.unflatten(0, (batch, -1)).permute(0, 2, 3, 1).flatten(2, 3)
    return AttentionOutput(values, lse)


def across(x: Tensor, batch: int) -> Tensor:
    """(B * m, H, n, W) -> (B * n, H, m, W): from columns to rows, or the other way."""
    return x.unflatten(0, (batch, -1)).permute(0, 3, 2, 1, 4).flatten(0, 1)


def seen_rows(seen: Tensor | None, m: int) -> Tensor | None:
    """(B, n * m) -> (B * n, m)."""
    return None if seen is None else seen.unflatten(1, (-1, m)).flatten(0, 1)


def seen_columns(seen: Tensor | None, m: int) -> Tensor | None:
    """(B, n * m) -> (B * m, n)."""
    return None if seen is None else seen.unflatten(1, (-1, m)).transpose(1, 2).flatten(0, 1)
