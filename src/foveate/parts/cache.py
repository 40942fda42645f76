"""A cache of bounded size: the first tokens and the last ones, re-indexed (StreamingLLM).

Of n_sink + n_recent places, a chunk of c new tokens takes its own before it is attended to, so
that n_sink + (n_recent - c) older ones remain. Positions are then 0 ... len - 1 *inside the cache*,
and the newest query has the last one: distances never exceed the capacity, however long the stream.
Xiao et al. 2023, arXiv 2309.17453, section 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.rope import Rope


class Field(NamedTuple):
    """What a cache declares of one of its tensors.

    unit: "token" (one entry per kept token) or "sequence"; shape: of one entry; limit: most
    entries that are kept between two updates, None if unbounded.
    """

    name: str
    unit: str
    shape: tuple[int, ...]
    limit: int | None


class SinkWindowCache:
    """Keys and values of one layer: the first `sinks` and the last `window` tokens.

    A chunk longer than `window` (a long first prompt) is attended to whole, beside the sinks, and
    cut afterwards; stream it in chunks of at most `window` to stay within the capacity.

    How positions are re-indexed depends on how keys come in:

    - before RoPE (`rotated=False`): `update` rotates all kept keys to 0 ... len - 1; rotate the
      queries to `query_positions()`.
    - after RoPE (`rotated=True`): queries and recent keys stay where they are, and what stands
      before dropped tokens (the sinks) is moved forward by their number. RoPE being relative, that
      is the same.
    - without `rope` keys go out as they came in: the positions of the sequence, or none.

    Args:
        sinks: tokens kept from the start.
        window: tokens kept from the end.
        rope: the model's rotary positions, or None to leave keys as they come.
        rotated: whether keys come in rotated already.
        start: (B,) left padding: index of each row's first real token in the first update.

    Raises:
        InputError: sinks below 0, window below 1, or shapes that change between updates.
    """

    def __init__(
        self,
        sinks: int = 4,
        window: int = 1024,
        rope: Rope | None = None,
        *,
        rotated: bool = False,
        start: Tensor | None = None,
    ) -> None:
        self.sinks = whole("SinkWindowCache", "sinks", sinks, least=0)
        self.window = whole("SinkWindowCache", "window", window, least=1)
        if start is not None and (start.dim() != 1 or start.is_floating_point()):
            raise InputError(f"SinkWindowCache(start): expected integers (B,), got {start}.")
        self.rope, self.rotated = rope, rotated
        self.seen = 0
        self._start = start
        self._first = torch.zeros(0, dtype=torch.int64, device="cpu")  # (B,) padding that came in
        self._pads = torch.zeros(
            0, dtype=torch.int64, device="cpu"
        )  # (B,) padding still kept, in front
        self._at = torch.zeros(
            0, 0, dtype=torch.int64, device="cpu"
        )  # (B, n) positions in the sequence
        self._last = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    # -- what it holds ---------------------------------------------------------------------------
    @property
    def capacity(self) -> int:
        """The most tokens kept between two updates: sinks + window."""
        return self.sinks + self.window

    def __len__(self) -> int:
        """Tokens kept now."""
        return 0 if self._keys is None else self._keys.shape[2]

    @property
    def evicted(self) -> Tensor:
        """(B,) int64: real tokens dropped so far, for each row."""
        if not len(self):
            return torch.zeros_like(self._pads)
        return self._at[:, -1] - self._places(len(self))[:, -1]

    @property
    def fields(self) -> tuple[Field, ...]:
        """The tensors it keeps; empty before the first update."""
        if self._keys is None or self._values is None:
            return ()
        heads, dim, value_dim = self._keys.shape[1], self._keys.shape[3], self._values.shape[3]
        return (
            Field("keys", "token", (heads, dim), self.capacity),
            Field("values", "token", (heads, value_dim), self.capacity),
        )

    def bytes(self) -> int:
        """Bytes of the keys and values kept now, all rows together."""
        held = [x for x in (self._keys, self._values) if x is not None]
        return sum(x.numel() * x.element_size() for x in held)

    # -- one step ---------------------------------------------------------------------------------
    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take in c new tokens and give back all that they may attend to, new ones last.

        Args:
            key: (B, Hkv, c, D), rotated or not as the cache was told.
            value: (B, Hkv, c, Dv).

        Returns:
            keys (B, Hkv, n, D) at their places and values (B, Hkv, n, Dv), n at most the capacity
            if c <= window. The queries stand at the end: attend under `causal()`.
        """
        self._check(key, value)
        new = key.shape[2]
        self._cut(self.sinks + max(0, self.window - new))
        assert self._keys is not None and self._values is not None
        keys = torch.cat((self._keys, key), 2)
        values = torch.cat((self._values, value), 2)
        at = _count(self.seen, self.seen + new) - self._first[:, None]
        self._keys, self._values, self._at = keys, values, torch.cat((self._at, at), 1)
        self.seen += new
        places = self._places(keys.shape[2])
        placed = self._placed(keys, places)
        self._last = places[:, -new:]
        self._cut(self.capacity)
        return placed, values

    def query_positions(self) -> Tensor:
        """(B, c) int64: places of the last update's tokens in the cache, as it then was."""
        if not self.seen:
            raise InputError("The cache is empty: update it before asking for query positions.")
        return self._last

    def _places(self, length: int) -> Tensor:
        """(B, length): positions in the cache, counted from each row's first real token."""
        return _count(0, length) - self._pads[:, None]

    def _placed(self, keys: Tensor, places: Tensor) -> Tensor:
        if self.rope is None:
            return keys
        if not self.rotated:
            return self.rope.rotate(keys, places.to(keys.device))
        gap = self._at - places  # tokens missing before each one
        by = gap[:, -1:] - gap
        moved = by.any(0).nonzero()
        if not len(moved):
            return keys
        end = int(moved[-1]) + 1
        front = self.rope.move(keys[:, :, :end], by[:, :end].to(keys.device))
        return torch.cat((front, keys[:, :, end:]), 2)

    def _cut(self, size: int) -> None:
        """Keep `size` tokens: padding goes first, then what stands right behind the sinks."""
        excess = len(self) - size
        if excess <= 0:
            return
        pads = self._pads.clamp_max(excess)
        index = _count(0, size)
        keep = torch.where(index < self.sinks, index + pads[:, None], index + excess)
        self._pads = self._pads - pads
        self._gather(keep)

    def _gather(self, keep: Tensor) -> None:
        """Keep the tokens at keep (B, n)."""
        assert self._keys is not None and self._values is not None
        self._at = self._at.gather(1, keep)
        if bool((keep == keep[:1]).all()):
            rows = keep[0].to(self._keys.device)
            self._keys, self._values = self._keys[:, :, rows], self._values[:, :, rows]
            return
        rows = keep.to(self._keys.device)[:, None, :, None]
        self._keys, self._values = (
            x.gather(2, rows.expand(-1, x.shape[1], -1, x.shape[3]))
            for x in (self._keys, self._values)
        )

    def _check(self, key: Tensor, value: Tensor) -> None:
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise InputError(
                "update(key, value): expected (B, Hkv, c, D) and (B, Hkv, c, Dv), got "
                f"{tuple(key.shape)} and {tuple(value.shape)}."
            )
        if key.shape[2] < 1:
            raise InputError("update(key, value): expected at least one new token, got none.")
        if self._keys is None or self._values is None:
            start = self._start
            if start is not None and len(start) != key.shape[0]:
                raise InputError(
                    f"The cache was made for {len(start)} rows of padding, but the batch has "
                    f"{key.shape[0]}."
                )
            zero = torch.zeros(key.shape[0], dtype=torch.int64, device="cpu")
            self._first = zero if start is None else start.to("cpu", torch.int64)
            self._pads, self._at = self._first, zero[:, None][:, :0]
            self._keys, self._values = key[:, :, :0], value[:, :, :0]
        for name, new, held in (("key", key, self._keys), ("value", value, self._values)):
            if new.shape[:2] != held.shape[:2] or new.shape[3] != held.shape[3]:
                raise InputError(
                    f"update({name}): the cache holds {tuple(held.shape)}, which "
                    f"{tuple(new.shape)} doesn't continue; only the number of tokens may differ."
                )

    # -- editing ----------------------------------------------------------------------------------
    def truncate(self, seen: int) -> None:
        """Take back tokens, so that the cache has seen `seen` of them.

        Raises:
            InputError: that would bring back tokens that were dropped.
        """
        back = self.seen - whole("truncate", "seen", seen, least=0)
        if back == 0:
            return
        if back < 0 or len(self) < self.seen:
            raise InputError(
                f"truncate({seen}): {self.seen} tokens were seen and {self.seen - len(self)} of "
                "them dropped; only a cache that dropped nothing can go back, and only to fewer."
            )
        assert self._keys is not None and self._values is not None
        self._keys, self._values = self._keys[:, :, :seen], self._values[:, :, :seen]
        self._at, self.seen = self._at[:, :seen], seen

    def reorder(self, rows: Tensor) -> None:
        """Let row b go on from what row rows[b] holds (beam search); rows (B',) int64."""
        if self._keys is None or self._values is None:
            return
        there = rows.to(self._keys.device)
        self._keys, self._values = self._keys[there], self._values[there]
        rows = rows.cpu()
        self._pads, self._first, self._at = self._pads[rows], self._first[rows], self._at[rows]

    def evict(self, index: Tensor) -> None:
        """Drop the kept tokens at index (n,), as places in the cache; those behind move up.

        Raises:
            InputError: a place that holds no token, or a sink, which the cache never gives up.
        """
        places = sorted({int(i) for i in index.reshape(-1).tolist()})
        if not places:
            return
        floor = self.sinks + (int(self._pads.max()) if len(self._pads) else 0)
        if places[0] < floor or places[-1] >= len(self):
            raise InputError(
                f"evict: places {floor} to {len(self) - 1} can be dropped (those before are sinks "
                f"or padding), got {places[0]} to {places[-1]}."
            )
        keep = torch.ones(len(self), dtype=torch.bool, device="cpu")
        keep[places] = False
        self._gather(keep.nonzero()[:, 0].expand(len(self._pads), -1))


def _count(start: int, stop: int) -> Tensor:
    """What the cache knows of its tokens is kept on the CPU, whatever the default device."""
    return torch.arange(start, stop, device="cpu")
