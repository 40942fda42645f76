"""Axial partitions: L tokens are n rows of m columns; token r * m + c is (r, c).

Direct for both: the own row, and the own column, as far as they aren't later.

    vertical     spans: every other column c', its rows before r
    horizontal   spans: every earlier row, its part left of column c and its part right of it

Both are prefixes, so their abstractions are running ones: u of the prefix (r, c') is a softmax of
the prefix's pooled query over the rows up to r. Without causality there are two families each, from
above and from below (from the left and from the right), over all other rows. L (m + 2 n) items or
so: O(L^1.5) with m near sqrt(L). L needn't be a multiple of m.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from foveate.methods.combiner.call import (
    CAUSAL,
    OTHERS,
    STRICT,
    Call,
    Spans,
    across,
    columns,
    folded,
    from_columns,
    from_rows,
    rows,
    seen_columns,
    seen_rows,
)
from foveate.methods.combiner.partition import Partition, Parts
from foveate.methods.combiner.pooling import Pooling
from foveate.methods.combiner.state import Lane
from foveate.ops import AttentionOutput
from foveate.parts.attention import Heads
from foveate.parts.cache import Field


class Axial(Partition):
    """What the axial partitions share: `size` is m, the tokens of a row."""

    def __init__(self, heads: Heads, queries: Pooling, keys: Pooling, size: int) -> None:
        super().__init__(heads, queries, keys)
        self.size = size

    def own_row(self, call: Call) -> AttentionOutput:
        """Attention within each query's row; `call` is whole rows."""
        m = self.size
        part = call.attend(
            *folded(rows, call, m),
            CAUSAL if call.causal else None,
            seen=seen_rows(call.seen, m),
        )
        return from_rows(part, len(call.q))

    def own_column(self, call: Call) -> AttentionOutput:
        """Attention within each query's column, itself left out."""
        m = self.size
        part = call.attend(
            *folded(columns, call, m),
            STRICT if call.causal else OTHERS,
            seen=seen_columns(call.seen, m),
        )
        return from_columns(part, len(call.q))

    @override
    def direct(self, call: Call) -> Parts:
        whole = call.padded(self.size)
        return _clipped([self.own_row(whole), self.own_column(whole)], call.length)

    @override
    def spans(self, call: Call) -> Parts:
        return _clipped(self.families(call.padded(self.size)), call.length)

    def families(self, call: Call) -> Parts:
        """Attention to the spans; `call` is whole rows."""
        raise NotImplementedError

    def running(self, call: Call, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Spans:
        """Prefixes of folded tokens (B', H, n, D), the own token left out: spans (B', H, n, D)."""
        inner = None if seen is None else seen[:, None]
        q_s, k_s = self.queries.prefixes(q, inner), self.keys.prefixes(k, inner)
        u = call.attend(q_s, k, v, CAUSAL, seen=seen).out
        count = torch.ones(1, k.shape[2], device=k.device).long() if seen is None else seen.long()
        return Spans(call.each(_shifted(k_s)), _shifted(u), F.pad(count.cumsum(1)[:, :-1], (1, 0)))

    def both_ways(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None
    ) -> tuple[Spans, Spans]:
        """`running` from the front, and from the end."""
        back = self.running(
            call, q.flip(2), k.flip(2), v.flip(2), None if seen is None else seen.flip(1)
        )
        return self.running(call, q, k, v, seen), Spans(
            back.key.flip(2), back.value.flip(2), back.counts.flip(1)
        )

    # -- decoding ------------------------------------------------------------------------------
    def place(self, lane: Lane) -> tuple[int, int]:
        """(r, c) of the token that is stepped."""
        return divmod(lane.length, self.size)

    @override
    def step_direct(self, call: Call, lane: Lane) -> Parts:
        k, v = lane.append("k", call.k), lane.append("v", call.v)
        r, c = self.place(lane)
        m = self.size
        parts = [call.attend(call.q, k[:, :, r * m :], v[:, :, r * m :])]
        if r:
            above = slice(c, r * m, m)
            parts.append(call.attend(call.q, k[:, :, above], v[:, :, above]))
        return parts

    def token_fields(self) -> tuple[Field, ...]:
        """Keys and values of all tokens."""
        h = self.heads
        return (
            Field("k", "token", (h.kv, h.key_dim), None),
            Field("v", "token", (h.kv, h.value_dim), None),
        )

    def counted_direct(self, length: int) -> int:
        """Tokens of own rows and columns, over all causal queries."""
        n, rest = divmod(length, self.size)
        m = self.size
        row = n * m * (m + 1) // 2 + rest * (rest + 1) // 2
        return row + m * n * (n - 1) // 2 + rest * n


class Vertical(Axial):
    """Spans are the other columns, above the own row."""

    def summarised(self, call: Call) -> list[Spans]:
        """Families of prefixes of columns, by rows: key and value (B * n, H, m, .)."""
        m, batch = self.size, len(call.q)
        seen = seen_columns(call.seen, m)
        q, k, v = folded(columns, call, m)
        found = [self.running(call, q, k, v, seen)] if call.causal else [
            *self.both_ways(call, q, k, v, seen)
        ]  # fmt: skip
        out = []
        for key, value, count in found:
            count = count.expand(m if len(count) == 1 else -1, -1)
            count = count.unflatten(0, (-1, m)).transpose(1, 2).flatten(0, 1)
            if len(count) < len(call.q) * (call.length // m):
                count = count.repeat(batch, 1)
            out.append(Spans(across(key, batch), across(value, batch), count))
        return out

    @override
    def families(self, call: Call) -> Parts:
        q = rows(call.q, self.size)
        return [
            from_rows(
                call.attend(q, key, value, OTHERS, bias=call.span_bias(count)), len(call.q)
            )
            for key, value, count in self.summarised(call)
        ]  # fmt: skip

    # -- decoding ------------------------------------------------------------------------------
    @property
    @override
    def fields(self) -> tuple[Field, ...]:
        h, m = self.heads, self.size
        return (
            *self.token_fields(),
            Field("q_row", "ring", (h.query, h.key_dim), m),
            Field("q_sum", "sequence", (h.query, m, h.key_dim), None),
            Field("k_sum", "sequence", (h.kv, m, h.key_dim), None),
            Field("column_u", "sequence", (h.query, m, h.value_dim), None),
        )

    @override
    def fill(self, call: Call, lane: Lane) -> None:
        m = self.size
        whole = call.length // m * m
        if lane.all("k") is None:  # a mixture's other part may have put them there
            lane.append("k", call.k)
            lane.append("v", call.v)
        for name, pool, x in (
            ("q_sum", self.queries, call.q),
            ("k_sum", self.keys, call.k),
        ):
            if whole:
                kept = pool.kept(columns(x[:, :, :whole], m))
                lane.put(name, kept.unflatten(0, (-1, m)).transpose(1, 2))
        if call.length > whole:
            lane.append("q_row", call.q[:, :, whole:])
        if whole:
            self._resummarise(call, lane, call.k[:, :, :whole], call.v[:, :, :whole])

    def _resummarise(self, call: Call, lane: Lane, k: Tensor, v: Tensor) -> None:
        """Make u of every column anew over all finished rows: the pooled query has changed."""
        m = self.size
        n = k.shape[2] // m
        kept = lane.get("q_sum")
        assert kept is not None
        q_s = self.queries.finished(kept, n).transpose(1, 2).flatten(0, 1)[:, :, None]
        u = call.attend(q_s, columns(k, m), columns(v, m)).out
        lane.put("column_u", u[:, :, 0].unflatten(0, (-1, m)).transpose(1, 2))

    @override
    def step_spans(self, call: Call, lane: Lane) -> Parts:
        r, c = self.place(lane)
        k_sum, u = lane.get("k_sum"), lane.get("column_u")
        if not r or k_sum is None or u is None or self.size == 1:
            return []
        key = self.keys.finished(k_sum, r)
        count = torch.full((1, self.size - 1), r, device=u.device)
        key, u = (torch.cat((x[:, :, :c], x[:, :, c + 1 :]), 2) for x in (call.each(key), u))
        return [call.attend(call.q, key, u, bias=call.span_bias(count))]

    @override
    def close(self, call: Call, lane: Lane) -> None:
        row = lane.append("q_row", call.q)
        r, c = self.place(lane)
        if c + 1 < self.size:
            return
        k, v = lane.all("k"), lane.all("v")
        assert k is not None and v is not None
        last = k[:, :, r * self.size :]
        lane.put(
            "q_sum", self.queries.joined(lane.get("q_sum"), self.queries.kept(row[:, :, :, None]))
        )
        lane.put("k_sum", self.keys.joined(lane.get("k_sum"), self.keys.kept(last[:, :, :, None])))
        lane.empty("q_row")
        self._resummarise(call, lane, k, v)

    @override
    def items(self, length: int) -> tuple[int, int, int]:
        m = self.size
        later = max(0, length - m)
        n, rest = divmod(length, m)
        read = m * n * (n + 1) // 2 + rest * (n + 1)
        return self.counted_direct(length), later * (m - 1), read


class Horizontal(Axial):
    """Spans are, of every earlier row, the part left of the own column and the part right of it."""

    def summarised(self, call: Call) -> list[Spans]:
        """Parts of rows left and right of each column, by columns: (B * m, H, n, .)."""
        m, batch = self.size, len(call.q)
        q, k, v = folded(rows, call, m)
        out = []
        for key, value, count in self.both_ways(call, q, k, v, seen_rows(call.seen, m)):
            n = call.length // m
            count = count.expand(n if len(count) == 1 else -1, -1)
            count = count.unflatten(0, (-1, n)).transpose(1, 2).flatten(0, 1)
            if len(count) < batch * m:
                count = count.repeat(batch, 1)
            out.append(Spans(across(key, batch), across(value, batch), count))
        return out

    @override
    def families(self, call: Call) -> Parts:
        q = columns(call.q, self.size)
        mask = STRICT if call.causal else OTHERS
        return [
            from_columns(call.attend(q, key, value, mask, bias=call.span_bias(count)), len(call.q))
            for key, value, count in self.summarised(call)
        ]

    # -- decoding ------------------------------------------------------------------------------
    @property
    @override
    def fields(self) -> tuple[Field, ...]:
        h = self.heads
        return (
            *self.token_fields(),
            Field("q_open", "ring", (h.query, h.key_dim), self.size),
            *(
                field
                for side in ("left", "right")
                for field in (
                    Field(f"{side}_k", "token", (h.kv, h.key_dim), None),
                    Field(f"{side}_u", "token", (h.query, h.value_dim), None),
                )
            ),
        )

    @override
    def fill(self, call: Call, lane: Lane) -> None:
        whole = call.length // self.size * self.size
        if lane.all("k") is None:
            lane.append("k", call.k)
            lane.append("v", call.v)
        if whole:
            q, k, v = (x[:, :, :whole] for x in (call.q, call.k, call.v))
            self._append(call, lane, q, k, v)
        if call.length > whole:
            lane.append("q_open", call.q[:, :, whole:])

    def _append(self, call: Call, lane: Lane, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Put the parts of whole rows on the lists, token by token."""
        m, batch = self.size, len(q)
        both = self.both_ways(call, rows(q, m), rows(k, m), rows(v, m), None)
        for side, found in zip(("left", "right"), both):
            for name, x in (("k", found.key[:, :: call.group]), ("u", found.value)):
                x = x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
                lane.append(f"{side}_{name}", x)

    @override
    def step_spans(self, call: Call, lane: Lane) -> Parts:
        r, c = self.place(lane)
        parts = []
        for side, length in (("left", c), ("right", self.size - 1 - c)):
            k, u = lane.all(f"{side}_k"), lane.all(f"{side}_u")
            if not length or k is None or u is None:
                continue
            k, u = k[:, :, c :: self.size], u[:, :, c :: self.size]
            count = torch.full((1, r), length, device=k.device)
            parts.append(call.attend(call.q, call.each(k), u, bias=call.span_bias(count)))
        return parts

    @override
    def close(self, call: Call, lane: Lane) -> None:
        row = lane.append("q_open", call.q)
        r, c = self.place(lane)
        if c + 1 < self.size:
            return
        k, v = lane.all("k"), lane.all("v")
        assert k is not None and v is not None
        done = slice(r * self.size, None)
        self._append(call, lane, row, k[:, :, done], v[:, :, done])
        lane.empty("q_open")

    @override
    def items(self, length: int) -> tuple[int, int, int]:
        m = self.size
        n, rest = divmod(length, m)
        inner = 2 * m - 2  # both sides of all columns; one of them is missing at each end
        spans = inner * n * (n - 1) // 2 + n * (2 * rest - (rest > 0))
        return self.counted_direct(length), spans, n * m * (m + 1)


def _shifted(x: Tensor) -> Tensor:
    """(B', H, n, W): what stood at t - 1 stands at t, 0 at the first."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


def _clipped(parts: Parts, length: int) -> Parts:
    """Without the tokens that filled up the last row."""
    return [AttentionOutput(out[:, :, :length], lse[:, :, :length]) for out, lse in parts]
