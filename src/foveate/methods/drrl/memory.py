"""What DR-RL keeps of sequences of equal length: spectra, the current rank, the current segment."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.drrl.lowrank import Projected
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Heads
from foveate.parts.cache import Field
from foveate.parts.kv_cache import TokenCache, token_field
from foveate.parts.state import State


@dataclass
class Memory:
    """Of B sequences of `length` real tokens.

    Attributes:
        length: tokens taken in.
        counted: tokens in the Gram matrices; made: those that the basis is of.
        gram_k, gram_q: (B, Hkv, d, d) of finished segments.
        sigma_k, sigma_q, sigma_s: (B, Hkv, d), of K, Q and S, when the basis was made.
        left, right: (B, Hkv, d, d), the basis.
        action, before: (B,) indices of the current rank and of the one before.
        x: (B, m, D), inputs of the current segment; q: its queries, where they are needed.
        projected: keys on the basis.
        tokens: k and v, where a state keeps them.
    """

    length: int = 0
    counted: int = 0
    made: int = 0
    gram_k: Tensor | None = None
    gram_q: Tensor | None = None
    sigma_k: Tensor | None = None
    sigma_q: Tensor | None = None
    sigma_s: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    action: Tensor | None = None
    before: Tensor | None = None
    x: Tensor | None = None
    q: Tensor | None = None
    projected: Projected | None = None
    tokens: TokenCache | None = None

    @classmethod
    def empty(cls) -> Memory:
        """Of no token."""
        return cls()

    def take(self, x: Tensor | None, q: Tensor | None) -> None:
        """Add inputs and queries of the current segment."""
        if x is not None:
            x = x.detach()
            self.x = x if self.x is None else torch.cat((self.x, x), 1)
        if q is not None:
            q = q.detach()
            self.q = q if self.q is None else torch.cat((self.q, q), 2)

    def pick(self, rows: Tensor) -> None:
        """Go on from what these rows hold."""
        for f in fields(self):
            held = getattr(self, f.name)
            if isinstance(held, Tensor):
                setattr(self, f.name, held[rows])
        if self.projected is not None:
            self.projected = self.projected.pick(rows)
        if self.tokens is not None:
            self.tokens.reorder(rows)

    def truncate(self, length: int, segment: int) -> None:
        """Forget the last tokens of the current segment.

        Raises:
            InputError: the cut lies in an earlier segment, whose rank and inputs aren't kept.
        """
        start = (self.length - 1) // segment * segment
        if length <= start:
            raise InputError(
                f"truncate: drrl can go back to token {start + 1} of a sequence of {self.length}, "
                f"not to {length}: what decided earlier ranks isn't kept; run the prompt again."
            )
        if self.x is not None:
            self.x = self.x[:, : length - start]
        if self.q is not None:
            self.q = self.q[:, :, : length - start]
        kept = None if self.projected is None else self.projected.cache
        for cache in (self.tokens, kept):
            if cache is not None and len(cache) > length:
                cache.truncate(length)
        self.length = length

    def bytes(self) -> int:
        """Of all tensors."""
        found = sum(
            x.numel() * x.element_size()
            for f in fields(self)
            if isinstance(x := getattr(self, f.name), Tensor)
        )
        if self.projected is not None and self.projected.cache is not None:
            found += self.projected.cache.bytes()
        return found + (0 if self.tokens is None else self.tokens.bytes())


class DRRLState(State):
    """Sequences by how much padding stands in front of them.

    k and v of every token, k on the current basis (r numbers of a key, r being the largest rank
    among the sequences), and for each sequence the Gram matrix and basis of its key heads and the
    layer's inputs in the current segment, from which the next rank is decided.

    Args:
        heads: sizes of the layer.
        segment: tokens between decisions.
        rank: the highest.
    """

    def __init__(self, heads: Heads, segment: int, rank: int) -> None:
        d = heads.key_dim
        super().__init__(
            (
                token_field("k", heads.kv, d),
                token_field("v", heads.kv, heads.value_dim),
                *([token_field("kw", heads.kv, min(rank, d))] if rank < d else ()),
                Field("gram", "sequence", (heads.kv, d, d), 1),
                Field("basis", "sequence", (heads.kv, d, d), 1),
                Field("hidden", "ring", (heads.dim,), segment),
            )
        )
        self.heads, self.segment = heads, segment
        self.pads: Tensor | None = None
        self.groups: dict[int, tuple[Tensor, Memory]] = {}

    @property
    @override
    def batch(self) -> int | None:
        return None if self.pads is None else len(self.pads)

    @override
    def bytes(self) -> int:
        return sum(memory.bytes() for _, memory in self.groups.values())

    def admit(self, real: Tensor) -> list[tuple[Tensor, int, Memory]]:
        """Take in new tokens; real (B, n) bool.

        Returns:
            Rows, the first real one of their new tokens, and what is kept of the sequences.

        Raises:
            InputError: padding behind a real token.
        """
        if bool((real[:, :-1] & ~real[:, 1:]).any()):
            raise InputError(
                "drrl goes on from the last token, but some sequence ends with padding; with a "
                "cache put padding on the left."
            )
        pads = self.pads if self.pads is not None else torch.zeros(len(real), dtype=torch.int64)
        new = (~real).sum(1).cpu()
        if bool((new[pads < self.length] > 0).any()):
            raise InputError("drrl: padding among new tokens after a prompt; leave it out.")
        self.pads = pads + new
        self.length += real.shape[1]
        found = []
        for pad in self.pads.unique().tolist():
            if pad >= self.length:
                continue  # all padding so far
            rows = (self.pads == pad).nonzero()[:, 0].to(real.device)
            if pad not in self.groups:
                made = Memory.empty()
                made.tokens = TokenCache(self.fields[:2])
                self.groups[pad] = (rows, made)
            first = max(0, pad - (self.length - real.shape[1]))
            found.append((rows, first, self.groups[pad][1]))
        return found

    @override
    def reset(self) -> None:
        self.length, self.pads, self.groups = 0, None, {}

    @override
    def reorder(self, rows: Tensor) -> None:
        if self.pads is None:
            return
        new = self.pads[rows.cpu()]
        for pad, (mine, memory) in list(self.groups.items()):
            taken = rows.to(mine.device)[(new == pad).to(mine.device)]
            if not len(taken):
                del self.groups[pad]
                continue
            places = torch.searchsorted(mine, taken)
            memory.pick(places)
            self.groups[pad] = ((new == pad).nonzero()[:, 0].to(mine.device), memory)
        self.pads = new

    @override
    def truncate(self, length: int) -> None:
        length = whole("truncate", "length", length, least=0)
        if length > self.length:
            raise InputError(f"truncate({length}): the state holds only {self.length} tokens.")
        if not length:
            return self.reset()
        if length < self.length:
            if any(pad >= length for pad in self.groups):
                raise InputError(f"truncate({length}): some sequence would be all padding.")
            ends = [(m, m.length - (self.length - length)) for _, m in self.groups.values()]
            for memory, end in ends:
                if end <= (memory.length - 1) // self.segment * self.segment:
                    memory.truncate(end, self.segment)  # refuses, before anything is cut
            for memory, end in ends:
                memory.truncate(end, self.segment)
            assert self.pads is not None
            self.length, self.pads = length, self.pads.clamp(max=length)
        return None

    @property
    def per_step(self) -> int:
        """Numbers of keys that a step at the highest rank reads of each token."""
        return prod(next((f.shape for f in self.fields if f.name == "kw"), self.fields[0].shape))
