"""MoBA: a query attends to its own block and to the earlier blocks whose mean keys it likes best.

    g_c = q . mean_{j in c} k_j,   X = own block + top-(k-1) of the earlier blocks by g

and one softmax over the keys of X, of its own block up to itself. The choice is made in fp32 for
each query and query head, carries no gradient and doesn't weight the output; there are no
parameters, so that a model may change between it and full attention at any time.

Source: Lu et al. 2025, arXiv 2502.13189, section 2; MoonshotAI/MoBA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.moba.documents import Documents, documents_of
from foveate.ops import Layout
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Pattern, mask_layout, remember
from foveate.parts.block_rows import rows_by_block, scores_of
from foveate.parts.context import Context
from foveate.parts.selection import topk_mask
from foveate.parts.tokens import tokens_of
from foveate.parts.trail import Trail

_ROWS = 1 << 24  # scores that are looked at at once


@dataclass(eq=False)
class _Means:
    """Means of a cache's whole blocks, (B, Hkv, n, D), and the first real key of each sequence."""

    trail: Trail
    first: list[int]
    means: Tensor


@dataclass(frozen=True)
class MoBA(Pattern):
    """Query i sees its own block up to itself, and the `topk - 1` best earlier blocks whole.

    Blocks are cut from each sequence's (with `documents(...)` in the mask, each document's) first
    token. Where fewer earlier blocks exist, all of them are seen. The mask must be causal, padding
    and documents apart. Routing is causal, as blocks are candidates only once they are complete.
    Models whose last layers stay full (paper: 3 of 32) name an attention for each layer: a list in
    `FoveateConfig`, an `Assignment` under `foveate.use`.

    Attributes:
        block: keys of a block (paper: 512 at 8K tokens, 4096 at 1M).
        topk: blocks that a query sees, its own counted (paper: 3 at 8K, 12 at 1M).
        decode: "dense" sees the whole cache, as the released code and the paper's evaluation;
            "sparse" is the same rule for new tokens, with the means of whole blocks kept.

    Raises:
        InputError: a field that doesn't fit, or a mask that isn't causal.
    """

    block: int = 512
    topk: int = 3
    decode: Literal["dense", "sparse"] = "dense"
    _kept: dict[int, _Means] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        whole("MoBA", "block", self.block, least=1)
        whole("MoBA", "topk", self.topk, least=1)
        if self.decode not in ("dense", "sparse"):
            raise InputError(f"MoBA(decode={self.decode!r}): expected 'dense' or 'sparse'.")

    @property
    def reserved(self) -> str:
        """What is seen whatever the scores say, in words."""
        return "its own block"

    def _decodes(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        return ctx.phase == "decode" or q.shape[2] == 1 < k.shape[2]

    @override
    def is_dense(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        # Without a causal mask `layout` refuses the call.
        if ctx.mask is None or not tokens_of(q, k, ctx).causal:
            return False
        return self.topk * self.block >= k.shape[2] or (
            self.decode == "dense" and self._decodes(q, k, ctx)
        )

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        tokens = tokens_of(q, k, ctx)
        if self.is_dense(q, k, ctx):
            return mask_layout(ctx.mask, q, k, ctx)
        lengths = (q.shape[2], k.shape[2])
        docs = remember(
            ctx,
            (MoBA, self.block, ctx.mask, lengths, q.device),
            lambda: documents_of(ctx, tokens, self.block),
        )
        chosen = self.choose(q, self._means(q, k, ctx, docs), docs)
        return rows_by_block(chosen, docs.blocks, k.shape[2], (docs.own, docs.place))

    def choose(self, q: Tensor, means: Tensor, docs: Documents) -> Tensor:
        """The earlier blocks that each query sees: bool (B, Hq, Lq, C).

        Args:
            q: (B, Hq, Lq, D).
            means: (B, Hkv, C, D) of the blocks' keys.
            docs: the call's blocks.
        """
        batch, heads, length, _ = q.shape
        count = docs.document.shape[1]
        numbers = torch.arange(count, device=q.device)
        mine = docs.document.expand(len(docs.own), -1).gather(1, docs.own.clamp_min(0))
        earlier = numbers < docs.own[..., None]  # own is -1 on padding: nothing is earlier
        earlier &= docs.document[:, None] == mine[..., None]
        found = torch.zeros(batch, heads, length, count, dtype=torch.bool, device=q.device)
        step = max(1, _ROWS // max(1, batch * heads * count))
        for start in range(0, length, step):
            rows = slice(start, start + step)
            allowed = earlier[:, None, rows]
            found[:, :, rows] = topk_mask(scores_of(q[:, :, rows], means), self.topk - 1, allowed)
        return found

    def _means(self, q: Tensor, k: Tensor, ctx: Context, docs: Documents) -> Tensor:
        """Means of the blocks; those that an earlier call of a cache has made are taken over."""
        if self.decode == "dense" or ctx.phase == "train" or not k.shape[0]:
            return docs.blocks.means(k)
        first = docs.blocks.keys[:, 0, 0].expand(len(k)).tolist()
        count = docs.blocks.keys.shape[1]
        kept = self._kept.get(ctx.layer) if self._decodes(q, k, ctx) else None
        rows = None if kept is None else kept.trail.rows(k)
        one = bool((docs.document == docs.document[:, :1]).logical_or(docs.document < 0).all())
        known: Tensor | None = None
        if kept is not None and rows is not None and one and kept.means.shape[2] <= count:
            same = [kept.first[r] for r in rows.tolist()] == first
            known = kept.means[rows.to(k.device)] if same else None
        done = 0 if known is None else known.shape[2]
        rest = type(docs.blocks)(docs.blocks.keys[:, done:]).means(k)
        means = rest if known is None else torch.cat((known, rest), 2)
        full = int((docs.blocks.sizes == self.block).sum(1).min())
        if one:
            self._kept[ctx.layer] = _Means(Trail(k), first, means[:, :, :full])
        return means
