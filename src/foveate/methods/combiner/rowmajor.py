"""Rowmajor: spans are whole earlier rows, summarised anew for each column.

Direct: the own row. Of every earlier row r' the query in column c sees one span, with

    u_{r',c} = sum_j softmax_j(q_{(r',c)} . k_{(r',j)}) v_{(r',j)}     over the whole row r'

and a key, by `key`:

    proj       W_k2 LN( x_{(r',c)} + dropout(W_1 u_{r',c}) )     x is the layer's input; for text
    wsum       the same weights on keys
    wsum_proj  proj, with the weights on keys in place of u (our reading of the name)
    none       k_{(r',c)}

Projected keys have no rotation of positions: use them with absolute embeddings, as the paper does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.combiner.axial import Axial, _clipped
from foveate.methods.combiner.call import (
    OTHERS,
    STRICT,
    Call,
    Spans,
    columns,
    folded,
    from_columns,
    from_rows,
    rows,
    seen_rows,
)
from foveate.methods.combiner.partition import Parts
from foveate.methods.combiner.pooling import Pooling
from foveate.methods.combiner.state import Lane
from foveate.ops.errors import InputError
from foveate.parts.attention import Heads
from foveate.parts.cache import Field
from foveate.parts.projection import join_heads, split_heads

KEYS = ("proj", "wsum", "wsum_proj", "none")


class Rowmajor(Axial):
    """See the module's text."""

    def __init__(
        self, heads: Heads, queries: Pooling, keys: Pooling, size: int, key: str, dropout: float
    ) -> None:
        super().__init__(heads, queries, keys, size)
        self.key = key
        self.projects = key in ("proj", "wsum_proj")
        if self.projects:
            width = heads.value_dim if key == "proj" else heads.key_dim
            self.inner = nn.Linear(heads.query * width, heads.dim, bias=False)
            self.norm = nn.LayerNorm(heads.dim)
            self.outer = nn.Linear(heads.dim, heads.kv * heads.key_dim, bias=False)
            self.dropout = nn.Dropout(dropout)

    @override
    def direct(self, call: Call) -> Parts:
        return _clipped([self.own_row(call.padded(self.size))], call.length)

    def summarised(self, call: Call) -> Spans:
        """Rows as seen from each of their columns: (B, H, n * m, .); `call` is whole rows."""
        m, batch = self.size, len(call.q)
        q, k, v = folded(rows, call, m)
        weighs = self.key in ("wsum", "wsum_proj")
        values = torch.cat((v, k), -1) if weighs else v
        seen = seen_rows(call.seen, m)
        found = from_rows(call.attend(q, k, values, seen=seen), batch).out
        u, keys = found[..., : v.shape[-1]], found[..., v.shape[-1] :]
        if self.projects:
            keys = self._projected(call, keys if weighs else u)
        elif self.key == "none":
            keys = call.k
        if keys.shape[1] != call.q.shape[1]:
            keys = call.each(keys)
        count = torch.full((1, call.length), m, device=q.device)
        if seen is not None:
            count = seen.sum(1).unflatten(0, (batch, -1)).repeat_interleave(m, 1)
        return Spans(keys, u, count)

    def _projected(self, call: Call, u: Tensor) -> Tensor:
        if call.x is None:
            raise InputError(
                f"Combiner(partition='rowmajor', key={self.key!r}) makes keys of the layer's "
                "input: run it inside foveate.Attention, or give Context(hidden=x)."
            )
        inner: Tensor = self.norm(call.x + self.dropout(self.inner(join_heads(u))))
        return split_heads(self.outer(inner), self.heads.kv)

    @override
    def families(self, call: Call) -> Parts:
        m, batch = self.size, len(call.q)
        found = self.summarised(call)
        count = found.counts.unflatten(1, (-1, m)).transpose(1, 2).flatten(0, 1)
        if len(count) < batch * m:
            count = count.repeat(batch, 1)
        part = call.attend(
            columns(call.q, m),
            columns(found.key, m),
            columns(found.value, m),
            STRICT if call.causal else OTHERS,
            bias=call.span_bias(count),
        )
        return [from_columns(part, batch)]

    # -- decoding ------------------------------------------------------------------------------
    @property
    def _key_heads(self) -> int:
        return self.heads.query if self.key == "wsum" else self.heads.kv

    @property
    @override
    def fields(self) -> tuple[Field, ...]:
        h, m = self.heads, self.size
        more = (Field("x", "ring", (1, h.dim), m),) if self.projects else ()
        return (
            Field("row_k", "ring", (h.kv, h.key_dim), m),
            Field("row_v", "ring", (h.kv, h.value_dim), m),
            Field("row_q", "ring", (h.query, h.key_dim), m),
            *more,
            Field("span_k", "token", (self._key_heads, h.key_dim), None),
            Field("span_u", "token", (h.query, h.value_dim), None),
        )

    @override
    def fill(self, call: Call, lane: Lane) -> None:
        whole = call.length // self.size * self.size
        if whole:
            self._summarise(_part(call, slice(0, whole)), lane)
        rest = _part(call, slice(whole, None))
        if rest.length:
            self._open(rest, lane)

    def _open(self, call: Call, lane: Lane) -> None:
        for name, x in (("row_q", call.q), ("row_k", call.k), ("row_v", call.v)):
            lane.append(name, x)
        if self.projects and call.x is not None:
            lane.append("x", call.x[:, None])

    def _summarise(self, call: Call, lane: Lane) -> None:
        found = self.summarised(call)
        lane.append("span_k", found.key if self.key == "wsum" else found.key[:, :: call.group])
        lane.append("span_u", found.value)

    @override
    def step_direct(self, call: Call, lane: Lane) -> Parts:
        self._open(call, lane)
        k, v = lane.all("row_k"), lane.all("row_v")
        assert k is not None and v is not None
        return [call.attend(call.q, k, v)]

    @override
    def step_spans(self, call: Call, lane: Lane) -> Parts:
        r, c = self.place(lane)
        k, u = lane.all("span_k"), lane.all("span_u")
        if k is None or u is None:
            return []
        k, u = k[:, :, c :: self.size], u[:, :, c :: self.size]
        k = k if self.key == "wsum" else call.each(k)
        count = torch.full((1, r), self.size, device=k.device)
        return [call.attend(call.q, k, u, bias=call.span_bias(count))]

    @override
    def close(self, call: Call, lane: Lane) -> None:
        if (lane.length + 1) % self.size:
            return
        q, k, v = (lane.all(name) for name in ("row_q", "row_k", "row_v"))
        assert q is not None and k is not None and v is not None
        held = lane.all("x")
        x = None if held is None else held[:, 0]
        row = Call(q, k, v, True, None, x, call.ctx, call.count_bias)
        self._summarise(row, lane)
        lane.empty("row_q", "row_k", "row_v", "x")

    @override
    def items(self, length: int) -> tuple[int, int, int]:
        m = self.size
        n, rest = divmod(length, m)
        direct = n * m * (m + 1) // 2 + rest * (rest + 1) // 2
        return direct, m * n * (n - 1) // 2 + rest * n, n * m * m


def _part(call: Call, part: slice) -> Call:
    q, k, v = (x[:, :, part] for x in (call.q, call.k, call.v))
    x = None if call.x is None else call.x[:, part]
    return Call(q, k, v, call.causal, None, x, call.ctx, call.count_bias)
