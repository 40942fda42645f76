"""Fixed(s): a query sees its own block directly, and every other block as one span.

Block b = i div s of query i; direct {b s .. i}, spans the blocks r < b (r != b without causality).
L (s + 2 L / s) items: O(L^1.5) with s near sqrt(L).
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from typing_extensions import override

from foveate.methods.combiner.call import (
    CAUSAL,
    OTHERS,
    Call,
    Spans,
    folded,
    from_rows,
    rows,
    seen_rows,
)
from foveate.methods.combiner.partition import Partition, Parts
from foveate.methods.combiner.pooling import Pooling
from foveate.methods.combiner.state import Lane
from foveate.ops import AttentionOutput, Layout
from foveate.parts.attention import Heads
from foveate.parts.cache import Field

TILE = (64, 16)  # few keys a tile: there are few spans


class Fixed(Partition):
    """Blocks of `size` tokens; see the module's text."""

    def __init__(self, heads: Heads, queries: Pooling, keys: Pooling, size: int) -> None:
        super().__init__(heads, queries, keys)
        self.size = size

    @override
    def direct(self, call: Call) -> Parts:
        m, length = self.size, call.length
        call = call.padded(m)
        part = call.attend(
            *folded(rows, call, m),
            CAUSAL if call.causal else None,
            seen=seen_rows(call.seen, m),
        )
        out, lse = from_rows(part, len(call.q))
        return [AttentionOutput(out[:, :, :length], lse[:, :, :length])]

    def summarised(self, call: Call) -> Spans:
        """Each block's k_S, u_S and number of tokens; of unfinished ones too."""
        m, batch = self.size, len(call.q)
        call = call.padded(m)
        seen = seen_rows(call.seen, m)
        q, k, v = folded(rows, call, m)
        inner = None if seen is None else seen[:, None]
        q_s, k_s = self.queries.over(q, inner), self.keys.over(k, inner)
        u = call.attend(q_s[:, :, None], k, v, seen=seen).out[:, :, 0]
        key, value = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (k_s, u))
        count = torch.full((1, key.shape[2]), m, device=q.device)
        if seen is not None:
            count = seen.sum(1).unflatten(0, (batch, -1))
        return Spans(call.each(key), value, count)

    @override
    def spans(self, call: Call) -> Parts:
        found = self.summarised(call)
        if found.key.shape[2] == 1:
            return []
        layout = _layout(call, self.size, found.key.shape[2])
        return [
            call.attend(
                call.q, found.key, found.value, layout=layout, bias=call.span_bias(found.counts)
            )
        ]

    # -- decoding ------------------------------------------------------------------------------
    @property
    @override
    def fields(self) -> tuple[Field, ...]:
        h, s = self.heads, self.size
        return (
            Field("k", "ring", (h.kv, h.key_dim), s),
            Field("v", "ring", (h.kv, h.value_dim), s),
            Field("q_sum", "sequence", (h.query, h.key_dim), None),
            Field("span_k", "block", (h.kv, h.key_dim), None),
            Field("span_u", "block", (h.query, h.value_dim), None),
        )

    @override
    def fill(self, call: Call, lane: Lane) -> None:
        whole = call.length // self.size * self.size
        if whole:
            found = self.summarised(_cut(call, slice(0, whole)))
            lane.append("span_k", found.key[:, :: call.group])
            lane.append("span_u", found.value)
        rest = _cut(call, slice(whole, None))
        if rest.length:
            lane.append("k", rest.k)
            lane.append("v", rest.v)
            lane.put("q_sum", self.queries.kept(rest.q))

    @override
    def step_direct(self, call: Call, lane: Lane) -> Parts:
        k, v = lane.append("k", call.k), lane.append("v", call.v)
        lane.put("q_sum", self.queries.joined(lane.get("q_sum"), self.queries.kept(call.q)))
        return [call.attend(call.q, k, v)]

    @override
    def step_spans(self, call: Call, lane: Lane) -> Parts:
        k, u = lane.all("span_k"), lane.all("span_u")
        if k is None or u is None:
            return []
        count = torch.full((1, k.shape[2]), self.size, device=k.device)
        return [call.attend(call.q, call.each(k), u, bias=call.span_bias(count))]

    @override
    def close(self, call: Call, lane: Lane) -> None:
        if (lane.length + 1) % self.size:
            return
        k, v, kept = lane.all("k"), lane.all("v"), lane.get("q_sum")
        assert k is not None and v is not None and kept is not None
        lane.append("span_k", self.keys.over(k)[:, :, None])
        lane.append("span_u", self.summary(call, self.queries.finished(kept, self.size), k, v))
        lane.empty("k", "v", "q_sum")

    @override
    def items(self, length: int) -> tuple[int, int, int]:
        s = self.size
        blocks, rest = divmod(length, s)
        direct = blocks * s * (s + 1) // 2 + rest * (rest + 1) // 2
        spans = s * blocks * (blocks - 1) // 2 + rest * blocks
        return direct, spans, blocks * s


def _cut(call: Call, part: slice) -> Call:
    """Some of the tokens."""
    q, k, v = (x[:, :, part] for x in (call.q, call.k, call.v))
    x = None if call.x is None else call.x[:, part]
    return Call(q, k, v, call.causal, None, x, call.ctx, call.count_bias)


def _layout(call: Call, size: int, spans: int) -> Layout:
    """Who sees which block, as tiles; kept for the layers of a forward."""
    key: Hashable = (Fixed, call.length, size, spans, call.causal, call.q.device)
    kept: dict[Hashable, Layout] = call.ctx.store
    if key not in kept:
        kept[key] = span_layout(call.length, size, spans, call.causal, call.q.device)
    return kept[key]


def span_layout(length: int, size: int, spans: int, causal: bool, device: object) -> Layout:
    """Queries by block against `spans` blocks: earlier ones, or all others."""
    block = torch.arange(length, device=device) // size  # type: ignore[call-overload]
    of_spans = torch.arange(spans, device=block.device)
    if causal:
        return CAUSAL.layout(length, spans, TILE, q_positions=block - 1, kv_positions=of_spans)
    return OTHERS.layout(length, spans, TILE, q_positions=block, kv_positions=of_spans)
