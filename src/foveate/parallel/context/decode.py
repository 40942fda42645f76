"""Decoding with a cache that lies on several ranks: no rank holds all keys.

Every rank has the new tokens' queries; each attends to the keys that it holds, and one all-gather
of Dv + 1 numbers for each query head (an output and its lse) lets every rank merge them all, in
rank order, so that all come to the very same numbers:

    lse = log sum_r exp(lse_r),   out = sum_r exp(lse_r - lse) out_r

New tokens go to the ranks in turns of `block`, so that the cache grows evenly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.ops import AttentionOutput, Mask, causal, merge
from foveate.ops.check import check_tensors
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parallel.context.attend import Sequence
from foveate.parallel.context.groups import links_of
from foveate.parallel.context.links import Links, packed, unpacked
from foveate.parallel.context.partial import How, add, nothing
from foveate.parallel.context.rule import MaskRule


class ShardedCache:
    """The keys and values of one layer, on all ranks together.

        cache = ShardedCache(group)
        cache.load(sequence, k, v)              # what a context-parallel prefill left on each rank
        cache.append(k_new, v_new)              # the new token's, which every rank has computed
        out, lse = cache.attend(q_new)          # the same on every rank

    Args:
        where: a process group, a device mesh, links, or None for all processes.
        block: tokens that go to one rank before the next has its turn.

    Raises:
        InputError: torch.distributed isn't set up, or block below 1.
    """

    def __init__(self, where: Any = None, block: int = 16) -> None:
        self.links: Links = links_of(where)
        self.block = whole("ShardedCache", "block", block, least=1)
        self.length, self._own = 0, 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._index = torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.length

    @property
    def held(self) -> int:
        """Tokens on this rank."""
        return self._own

    def load(self, sequence: Sequence, k: Tensor, v: Tensor) -> None:
        """Take over a rank's own tokens of a sequence that was shared out.

        Args:
            sequence: the one whose tokens they are.
            k: (B, Hkv, L, D), this rank's.
            v: (B, Hkv, L, Dv), likewise.

        Raises:
            InputError: the cache isn't empty, or they aren't this rank's tokens.
        """
        if self.length:
            raise InputError("ShardedCache.load: the cache holds tokens already; begin a new one.")
        if k.shape[2] != len(sequence.index):
            raise InputError(
                f"ShardedCache.load: this rank holds {len(sequence.index)} tokens of the sequence, "
                f"got {k.shape[2]}."
            )
        self._put(k, v, sequence.index)
        self.length = sequence.length

    def append(self, k: Tensor, v: Tensor) -> None:
        """New tokens' keys (B, Hkv, n, D) and values, the same on every rank; it keeps its own."""
        index = torch.arange(self.length, self.length + k.shape[2])
        mine = (index // self.block) % self.links.size == self.links.rank
        here = mine.to(k.device)
        self._put(k[:, :, here], v[:, :, here], index[mine])
        self.length += k.shape[2]

    def _put(self, k: Tensor, v: Tensor, index: Tensor) -> None:
        with torch.no_grad():
            need = self._own + len(index)
            if self._k is None or self._v is None or need > self._k.shape[2]:
                room = max(16, need, 2 * self._own)
                old = (self._k, self._v)
                self._k, self._v = (x.new_zeros(*x.shape[:2], room, x.shape[3]) for x in (k, v))
                for new, had in zip((self._k, self._v), old):
                    if had is not None:
                        new[:, :, : self._own] = had[:, :, : self._own]
            self._k[:, :, self._own : need] = k
            self._v[:, :, self._own : need] = v
            self._index = torch.cat((self._index, index))
            self._own = need

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise InputError(f"truncate({length}): expected 0 to {self.length}.")
        keep = (self._index < length).nonzero()[:, 0]
        if self._k is not None and self._v is not None:
            at = keep.to(self._k.device)
            self._k[:, :, : len(keep)] = self._k[:, :, at].clone()
            self._v[:, :, : len(keep)] = self._v[:, :, at].clone()
        self._index, self._own, self.length = self._index[keep], len(keep), length

    @torch.no_grad()
    def attend(
        self,
        query: Tensor,
        mask: Mask | None = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> AttentionOutput:
        """Attention of the newest tokens over everything that all ranks hold.

        Args:
            query: (B, Hq, n, D) of the last n tokens, the same on every rank.
            mask: over all tokens; None is causal.
            scale: factor on the scores; None is D ** -0.5.
            softcap: as in `foveate.attention`.
            backend: of the core op.

        Raises:
            InputError: nothing is cached, or more queries than tokens.
        """
        if self._k is None or self._v is None:
            raise InputError("ShardedCache.attend: nothing is cached yet; load or append first.")
        if query.dim() != 4 or query.shape[2] > self.length:
            raise InputError(
                f"ShardedCache.attend: expected (B, Hq, n, D) with n up to {self.length}, got "
                f"{tuple(query.shape)}."
            )
        k, v = self._k[:, :, : self._own], self._v[:, :, : self._own]
        check_tensors(query, k, v)
        scale = query.shape[3] ** -0.5 if scale is None else scale
        rule = MaskRule(causal() if mask is None else mask, self.length)
        at = torch.arange(self.length - query.shape[2], self.length)
        part = rule.part(at, self._index)
        mine = add(None, query, k, v, part, How(scale, softcap, backend))
        mine = nothing(query, v.shape[3]) if mine is None else mine
        flat = packed(mine.out, mine.lse)
        every = self.links.all_gather(flat, [flat.numel()] * self.links.size, "partials")
        shapes = (mine.out.shape, mine.lse.shape)
        done = merge([AttentionOutput(*unpacked(one, *shapes)) for one in every])
        return AttentionOutput(done.out.to(query.dtype), done.lse)
