"""Recognising keys that go on where an earlier call's ended, so that a method may keep its state.

A method sees the keys of a call, not the cache that they lie in. What it derived from the first n
keys (a summary, a decision) still holds in a later call if those keys are still there. Some of
them, spread over the sequence and its last ones, are compared bit by bit; a key depends on all
tokens before it in every layer but the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SPREAD, _LAST = 16, 8


class Trail:
    """What is needed to recognise keys (B, Hkv, n, D) later on."""

    def __init__(self, k: Tensor) -> None:
        n = k.shape[2]
        count = min(n, _SPREAD)
        spread = torch.arange(count, device=k.device) * (n - 1) // max(1, count - 1)
        last = torch.arange(max(0, n - _LAST), n, device=k.device)
        self.length = n
        self._at = torch.cat((spread, last))
        self._kept = k.detach()[:, :, self._at].clone()

    def rows(self, k: Tensor) -> Tensor | None:
        """Which sequence each of k (B', Hkv, m, D) goes on from, (B',) int64.

        Sequences may have been reordered, dropped or repeated since, as in beam search. None if
        some of them goes on from none, or if there are fewer keys than there were.
        """
        kept = self._kept
        if k.shape[2] < self.length or k.shape[1] != kept.shape[1] or k.shape[3] != kept.shape[3]:
            return None
        now = k.detach()[:, :, self._at]
        if now.dtype != kept.dtype or now.device != kept.device:
            return None
        if now.shape == kept.shape and torch.equal(now, kept):
            return torch.arange(len(now), device="cpu")
        same = (now[:, None] == kept[None]).flatten(2).all(2)
        if not bool(same.any(1).all()):
            return None
        return same.int().argmax(1).cpu()
