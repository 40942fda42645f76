"""Logsparse: the prefix [0, i) in aligned spans of lengths 2^l, one for each set bit of i.

Direct {i}, and {i - 1} if i is odd; for every set bit l >= 1 of i the span
[(i >> (l + 1)) << (l + 1), that + 2^l). Each query has 1 + popcount(i) items, and each level has
its summaries: O(L log L). Only blocks of even number are ever a span.

Without causality (the paper's appendix isn't public, so this is ours) the same is done on both
sides: behind i as if the sequence were read from its end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from foveate.methods.combiner.call import Call, Spans, unreversed
from foveate.methods.combiner.partition import Partition, Parts
from foveate.methods.combiner.state import Lane
from foveate.ops import Layout, causal, window
from foveate.ops.layout import bits as bitset
from foveate.parts.cache import Field

TILE = 64  # queries; a tile's rows agree in all bits from _LOW on
_LOW = 6
_KEYS = 32  # keys of a list: at most 31 spans lie within a tile, and at most 32 before it
_OWN = causal() & window(0, 0, block=2)
_OWN_EARLIER = _OWN & ~window(0, 0)


class Logsparse(Partition):
    """See the module's text."""

    @override
    def direct(self, call: Call) -> Parts:
        parts = [call.attend(call.q, call.k, call.v, _OWN)]
        if not call.causal:
            back = call.reversed()
            part = back.attend(back.q, back.k, back.v, _OWN_EARLIER)
            parts.append(unreversed(part, call))
        return parts

    @override
    def spans(self, call: Call) -> Parts:
        parts = self._before(call)
        if not call.causal:
            parts += [unreversed(part, call) for part in self._before(call.reversed())]
        return parts

    def _before(self, call: Call) -> Parts:
        """The spans before each query. Padding at the end is in no span that is seen."""
        found = self.summarised(call)
        if found is None:
            return []
        key = (Logsparse, call.length, call.q.device)
        if key not in call.ctx.store:
            call.ctx.store[key] = span_layout(call.length).to(call.q.device)
        layout = call.ctx.store[key]
        bias = call.span_bias(found.counts)
        return [call.attend(call.q, found.key, found.value, layout=layout, bias=bias)]

    def summarised(self, call: Call) -> Spans | None:
        """Blocks of 2, 4, 8, ... tokens, of each size those of even number, one after the other."""
        keys, values, counts = [], [], []
        for level, count in enumerate(blocks_of_levels(call.length), start=1):
            size = 1 << level
            q, k, v = (_even(x, size, count) for x in (call.q, call.k, call.v))
            q_s, k_s = self.queries.over(q), self.keys.over(k)
            u = call.attend(q_s[:, :, None], k, v).out[:, :, 0]
            keys.append(k_s.unflatten(0, (-1, count)).transpose(1, 2))
            values.append(u.unflatten(0, (-1, count)).transpose(1, 2))
            counts += [size] * count
        if not keys:
            return None
        count_of = torch.tensor(counts, device=call.q.device)[None]
        return Spans(call.each(torch.cat(keys, 2)), torch.cat(values, 2), count_of)

    # -- decoding ------------------------------------------------------------------------------
    @property
    @override
    def fields(self) -> tuple[Field, ...]:
        h = self.heads
        return (
            Field("k", "token", (h.kv, h.key_dim), None),
            Field("v", "token", (h.kv, h.value_dim), None),
            *(
                Field(name, "ring", shape, 64)
                for name, shape in (
                    ("q_sum", (h.query, h.key_dim)),
                    ("k_sum", (h.kv, h.key_dim)),
                    ("span_k", (h.kv, h.key_dim)),
                    ("span_u", (h.query, h.value_dim)),
                )
            ),
        )

    @override
    def fill(self, call: Call, lane: Lane) -> None:
        lane.append("k", call.k)
        lane.append("v", call.v)
        start = 0
        for level in _bits(call.length):
            part = slice(start, start + (1 << level))
            q_sum = self.queries.kept(call.q[:, :, part])
            k_sum = self.keys.kept(call.k[:, :, part])
            self._push(call, lane, level, q_sum, k_sum, call.k[:, :, part], call.v[:, :, part])
            start = part.stop

    def _push(
        self, call: Call, lane: Lane, level: int, q_sum: Tensor, k_sum: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """Put a block of 2^level tokens on the stack; levels below it are on it no more."""
        count = 1 << level
        lane.put(f"q_sum{level}", q_sum)
        lane.put(f"k_sum{level}", k_sum)
        if level:
            q_s = self.queries.finished(q_sum, count)
            lane.put(f"span_k{level}", self.keys.finished(k_sum, count))
            lane.put(f"span_u{level}", self.summary(call, q_s, k, v)[:, :, 0])

    @override
    def step_direct(self, call: Call, lane: Lane) -> Parts:
        k, v = lane.append("k", call.k), lane.append("v", call.v)
        own = -1 - lane.length % 2
        return [call.attend(call.q, k[:, :, own:], v[:, :, own:])]

    @override
    def step_spans(self, call: Call, lane: Lane) -> Parts:
        levels = [level for level in _bits(lane.length) if level]
        if not levels:
            return []
        keys = [lane.get(f"span_k{level}") for level in levels]
        values = [lane.get(f"span_u{level}") for level in levels]
        count = torch.tensor([[1 << level for level in levels]], device=call.q.device)
        key = call.each(torch.stack([x for x in keys if x is not None], 2))
        value = torch.stack([x for x in values if x is not None], 2)
        return [call.attend(call.q, key, value, bias=call.span_bias(count))]

    @override
    def close(self, call: Call, lane: Lane) -> None:
        q_sum, k_sum = self.queries.kept(call.q), self.keys.kept(call.k)
        level = 0
        while lane.length >> level & 1:  # as a carry runs through the bits
            q_sum = self.queries.joined(lane.get(f"q_sum{level}"), q_sum)
            k_sum = self.keys.joined(lane.get(f"k_sum{level}"), k_sum)
            names = ("q_sum", "k_sum", "span_k", "span_u")
            lane.empty(*(f"{name}{level}" for name in names))
            level += 1
        k, v = lane.all("k"), lane.all("v")
        assert k is not None and v is not None
        size = 1 << level
        self._push(call, lane, level, q_sum, k_sum, k[:, :, -size:], v[:, :, -size:])

    @override
    def items(self, length: int) -> tuple[int, int, int]:
        ones = sum(_ones_below(length, bit) for bit in range(1, length.bit_length()))
        direct = length + length // 2
        read = sum(count << (n + 1) for n, count in enumerate(blocks_of_levels(length)))
        return direct, ones, read


def blocks_of_levels(length: int) -> list[int]:
    """How many blocks of 2, 4, 8, ... tokens are the span of some query."""
    found = []
    level = 1
    while length > 1 << level:
        # Block r, even, is seen from token (r + 1) 2^l on.
        found.append((((length - 1) >> level) + 1) // 2)
        level += 1
    return found


def _ones_below(length: int, bit: int) -> int:
    """How many of the numbers 0 ... length - 1 have this bit."""
    whole, rest = divmod(length, 2 << bit)
    return (whole << bit) + max(0, rest - (1 << bit))


def _bits(number: int) -> list[int]:
    """The set bits, the highest first."""
    return [bit for bit in reversed(range(number.bit_length())) if number >> bit & 1]


def _even(x: Tensor, size: int, count: int) -> Tensor:
    """Blocks 0, 2, 4, ... of x (B, H, L, W): (B * count, H, size, W)."""
    need = (2 * count - 1) * size
    x = F.pad(x[:, :, :need], (0, 0, 0, size))
    return x.unflatten(2, (count, 2 * size))[:, :, :, :size].transpose(1, 2).flatten(0, 1)


def span_layout(length: int) -> Layout:
    """Tiles of 64 queries against lists of spans, as `Logsparse.summarised` orders them.

    Within a tile all queries agree in the bits from 6 on, and in the spans that these name; the
    lower bits name spans within the tile, in the same way in every tile.
    """
    counts = blocks_of_levels(length)
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    tiles = -(-length // TILE)
    tile = torch.arange(tiles)
    rows = torch.arange(TILE)
    near, seen = [], []
    for level in range(1, min(_LOW, len(counts) + 1)):
        blocks = torch.arange(0, TILE >> level, 2)
        number = tile[:, None] * ((TILE >> level) // 2) + blocks // 2
        near.append(torch.where(number < counts[level - 1], offsets[level - 1] + number, -1))
        seen.append((rows[:, None] >> level) == blocks + 1)
    far = []
    for level in range(_LOW, len(counts) + 1):
        at = tile >> (level - _LOW)
        far.append(torch.where(at % 2 == 1, offsets[level - 1] + at // 2, -1))
    lists, patterns = [_wide(torch.cat(near, 1))], [torch.cat(seen, 1)]
    kinds = [torch.ones(tiles, dtype=torch.int32)]
    cells = [tile]
    if far:
        later = torch.stack(far, 1)
        some = (later >= 0).any(1)
        lists.append(_wide(later[some]))
        kinds.append(torch.zeros(int(some.sum()), dtype=torch.int32))
        cells.append(tile[some])
    bits = F.pad(torch.cat(patterns, 1), (0, _KEYS - patterns[0].shape[1]))
    cell = torch.cat(cells)
    order = torch.argsort(cell, stable=True)
    ends = torch.bincount(cell, minlength=tiles).cumsum(0)
    first = -(-offsets[-1] // _KEYS)  # lists are numbered after the ordinary tiles
    return Layout(
        q_len=length,
        kv_len=offsets[-1],
        q_tile=TILE,
        kv_tile=_KEYS,
        ptr=F.pad(ends, (1, 0))[None, None],
        cols=(first + torch.arange(len(cell)))[order].int(),
        kinds=torch.cat(kinds)[order],
        bits=bitset.pack(bits.mT[None]),
        gathered=torch.cat(lists).int(),
    )


def _wide(lists: Tensor) -> Tensor:
    return F.pad(lists, (0, _KEYS - lists.shape[1]), value=-1)
