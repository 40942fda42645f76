"""A cache of at most w keys for each key/value head that decodes exactly.

S_{t+1} less t + 1 is a part of S_t: what a query doesn't keep, none after it does. So the key of
the least importance can go for good as soon as w + 1 are there. Each key's importance is kept with
it (one number), never computed from its value again; among equals the one that came first goes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.cache import Field
from foveate.parts.state import State

FIELDS = ("k", "v", "rank", "place")


class KeptKeys(State):
    """Keys, values and their order.

    held: k (B, G, n, D), v (B, G, n, Dv), rank (B, G, n) fp32 or wider, -inf where no key is, and
    place (B, G, n) int32, where in the sequence it stands.

    Args:
        heads: G.
        key_dim: D.
        value_dim: Dv.
        limit: w, most keys of a head; None keeps all.
    """

    def __init__(self, heads: int, key_dim: int, value_dim: int, limit: int | None) -> None:
        super().__init__(
            [
                Field("k", "token", (heads, key_dim), limit),
                Field("v", "token", (heads, value_dim), limit),
                Field("rank", "token", (heads,), limit),
                Field("place", "token", (heads,), limit),
            ]
        )
        self.limit = limit

    @property
    def size(self) -> int:
        """Keys held for each head."""
        return self.held["k"].shape[2] if self.held else 0

    @override
    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens, while none of them was dropped.

        Raises:
            InputError: there are fewer, or some were dropped already.
        """
        length = whole("truncate", "length", length, least=0)
        if 0 < length < self.length and self.size < self.length:
            raise InputError(
                f"truncate({length}): of {self.length} tokens only {self.size} for each head are "
                "kept, and those that were dropped can't be brought back; run the shorter prompt "
                "again."
            )
        if not 0 < length < self.length:
            super().truncate(length)
            return
        self._sort()
        self.held = {name: x[:, :, :length] for name, x in self.held.items()}
        self.length = length

    def append(self, k: Tensor, v: Tensor, rank: Tensor) -> None:
        """Take in n new tokens, however many are then held; shapes as in `held`."""
        n = k.shape[2]
        self._check(k, v)
        place = torch.arange(self.length, self.length + n, dtype=torch.int32, device=k.device)
        new = {"k": k, "v": v, "rank": rank, "place": place.expand(rank.shape)}
        if self.held:
            self._sort()
            new = {name: torch.cat((self.held[name], x), 2) for name, x in new.items()}
        else:  # `replace` writes here: into the caller's tensors never, nor into expanded ones
            form = torch.contiguous_format
            new = {name: x.clone(memory_format=form) for name, x in new.items()}
        self.held = new
        self.length += n

    def cut(self) -> None:
        """Drop all but the w best of each head, the later of equals; they stay in order."""
        if self.limit is None or self.size <= self.limit:
            return
        order = self.held["rank"].argsort(dim=-1, stable=True)[..., -self.limit :]
        self._take(order.sort(-1).values)

    def replace(self, k: Tensor, v: Tensor, rank: Tensor) -> None:
        """Take in one new token in the place of the least important one, which may be itself.

        Writes to one place of each head; all w places must be held.
        """
        self._check(k, v)
        held = self.held
        if any(x.is_inference() for x in held.values()) and not torch.is_inference_mode_enabled():
            held = self.held = {name: x.clone() for name, x in held.items()}
        least = held["rank"].amin(-1, keepdim=True)
        last = torch.iinfo(torch.int32).max
        oldest = held["place"].masked_fill(held["rank"] > least, last)
        at = oldest.argmin(-1, keepdim=True)  # (B, G, 1)
        better = (rank >= least) & (rank > -torch.inf)
        place = torch.full_like(rank, self.length).to(torch.int32)
        for name, x in (("k", k), ("v", v), ("rank", rank), ("place", place)):
            where = at.view(*at.shape, *(1,) * (x.dim() - 3)).expand_as(x)
            keep = better.view(*better.shape, *(1,) * (x.dim() - 3))
            held[name].scatter_(2, where, torch.where(keep, x, held[name].gather(2, where)))
        self.length += 1

    def _sort(self) -> None:
        """Into the order of the sequence; `replace` leaves another."""
        place = self.held["place"]
        if self.size > 1 and bool((place.diff(dim=-1) < 0).any()):
            self._take(place.argsort(dim=-1))

    def _take(self, at: Tensor) -> None:
        self.held = {
            name: x.gather(
                2, at.view(*at.shape, *(1,) * (x.dim() - 3)).expand(*at.shape, *x.shape[3:])
            )
            for name, x in self.held.items()
        }

    def _check(self, k: Tensor, v: Tensor) -> None:
        heads, width = self.fields[0].shape
        wanted = (heads, width, self.fields[1].shape[1])
        if (k.shape[1], k.shape[3], v.shape[3]) != wanted:
            raise InputError(
                f"dma: the state is for {wanted[0]} heads of width {wanted[1]} and {wanted[2]}, "
                f"got keys {tuple(k.shape)} and values {tuple(v.shape)}."
            )
        held = self.held.get("k")
        if held is not None and (held.shape[0], held.dtype) != (k.shape[0], k.dtype):
            raise InputError(
                f"dma: the state holds {held.shape[0]} rows of {held.dtype}, got {k.shape[0]} of "
                f"{k.dtype}; only the number of tokens may differ."
            )
