"""Attention over a layout in pure torch: visits the listed tiles and no others, on any device.

Query tiles with lists of like length are taken together; their keys are gathered, and one softmax
runs over each tile's whole list. Work and memory follow the visited tiles: the largest temporary
holds `_BUDGET` scores, or those of one tile's list for one key/value head if they are more. The
backward recomputes them from the lse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops.backends.base import Backend, Gradients, Inputs, lse_dtype
from foveate.ops.bias import entries
from foveate.ops.layout import FULL, Layout
from foveate.ops.masks import window
from foveate.ops.types import AttentionOutput

_BUDGET = 1 << 21


class Blocks(Backend):
    """Pure torch over tiles; forward and backward."""

    name = "blocks"
    narrow_keys = True

    @override
    def forward(self, inputs: Inputs) -> AttentionOutput:
        layout = resolved(inputs)
        batch, heads, q_len, _ = inputs.query.shape
        work = lse_dtype(inputs.query.dtype)
        rows = layout.q_tiles * layout.q_tile
        out = inputs.query.new_zeros(batch, heads, rows, inputs.value.shape[-1], dtype=work)
        lse = inputs.query.new_full((batch, heads, rows), -torch.inf, dtype=work)
        for chunk in chunks(inputs, layout, work):
            scores, _ = chunk.scores(inputs)
            top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(work).min)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            part = (weights @ chunk.value).div_(total.masked_fill(total == 0, 1.0))
            out[chunk.virtual] = chunk.spread(part)
            lse[chunk.virtual] = chunk.spread(top + total.log())[..., 0]
        if layout.q_index is None:
            return AttentionOutput(
                out[:, :, :q_len].to(inputs.query.dtype), lse[:, :, :q_len].clone()
            )
        return _merge_rows(layout, out, lse, q_len, inputs.query.dtype)

    @override
    def backward_pass(
        self,
        inputs: Inputs,
        output: AttentionOutput,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
    ) -> Gradients:
        layout = resolved(inputs)
        work = lse_dtype(inputs.query.dtype)
        out, lse = output.out.to(work), output.lse
        do = torch.zeros_like(out) if grad_out is None else grad_out.to(work)
        delta = (do * out).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse.to(work)
        dq, dk, dv = (
            torch.zeros_like(x, dtype=work) for x in (inputs.query, inputs.key, inputs.value)
        )
        dbias = None if inputs.bias is None else torch.zeros_like(inputs.bias, dtype=work)
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        for chunk in chunks(inputs, layout, work):
            scores, slope = chunk.scores(inputs)
            row = chunk.rows(finite[..., None])
            weights = scores.sub_(row).exp_()
            g = chunk.rows(do)
            ds = weights * (g @ chunk.value.mT - chunk.rows(delta[..., None]))
            chunk.add_keys(dv, weights.mT @ g)
            if dbias is not None:
                chunk.add_bias(dbias, ds, inputs)
            if slope is not None:
                ds = ds * slope
            ds = ds * inputs.scale
            chunk.add_keys(dk, ds.mT @ chunk.query)
            chunk.add_rows(dq, ds @ chunk.key)
        return Gradients(
            dq.to(inputs.query.dtype),
            dk.to(inputs.key.dtype),
            dv.to(inputs.value.dtype),
            None if dbias is None or inputs.bias is None else dbias.to(inputs.bias.dtype),
        )


def resolved(inputs: Inputs, *, gathers: bool = True) -> Layout:
    """The layout of a call; without `gathers` its queries stay in their order."""
    everything = window(-1, -1) if inputs.mask is None and inputs.layout is None else inputs.mask
    call = Inputs(inputs.query, inputs.key, inputs.value, everything, inputs.layout)
    call = call.resolved(128, gathers=gathers)
    assert call.layout is not None
    return call.layout


def _merge_rows(
    layout: Layout, out: Tensor, lse: Tensor, q_len: int, dtype: torch.dtype
) -> AttentionOutput:
    """Bring virtual rows to their queries; those of one query are merged by their lse."""
    assert layout.q_index is not None
    batch, heads = out.shape[:2]
    index = layout.q_index.long()
    index = index.repeat_interleave(heads // index.shape[1] if index.shape[1] > 1 else heads, 1)
    index = index.expand(batch, heads, -1)
    index = index.masked_fill(index < 0, q_len)  # one spare row takes what belongs to no query
    part, own = out[:, :, : index.shape[-1]], lse[:, :, : index.shape[-1]]
    spare = (batch, heads, q_len + 1)
    top = own.new_full(spare, -torch.inf).scatter_reduce(2, index, own, "amax")
    base = top.masked_fill(top == -torch.inf, 0.0)
    weight = torch.exp(own - base.gather(2, index))
    total = own.new_zeros(spare).scatter_add(2, index, weight)
    wide = index[..., None].expand(-1, -1, -1, out.shape[-1])
    summed = out.new_zeros(*spare, out.shape[-1]).scatter_add(2, wide, weight[..., None] * part)
    merged = summed / total.masked_fill(total == 0, 1.0)[..., None]
    return AttentionOutput(merged[:, :, :q_len].to(dtype), (base + total.log())[:, :, :q_len])


@dataclass
class _Chunk:
    """A few query tiles of one group, with the keys of their lists.

    query (b, n, R, pack * q_tile, D), key and value (b, n, R, K, D or Dv): b batch entries, n
    key/value heads, R query tiles, the `pack` query heads that share a key/value head as rows.
    """

    batches: Tensor
    heads: Tensor  # (n, pack) query heads
    kv_heads: Tensor  # (n,)
    q_index: Tensor  # (R, q_tile), clamped
    k_index: Tensor  # (R, K), clamped
    v_index: Tensor  # (R, q_tile) virtual rows
    hidden: Tensor | None  # (R, q_tile, K) elements that don't attend
    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def virtual(self) -> tuple[Tensor, Tensor, Tensor]:
        """Index (b, n, R, pack, q_tile) of these rows in a (B, Hq, Tq * q_tile, ...) tensor."""
        return (
            self.batches[:, None, None, None, None],
            self.heads[None, :, None, :, None],
            self.v_index[None, None, :, None, :],
        )

    @property
    def real(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same for a (B, Hq, Lq, ...) tensor."""
        return (*self.virtual[:2], self.q_index[None, None, :, None, :])

    def rows(self, x: Tensor) -> Tensor:
        """X (B, Hq, Lq, C) at this chunk's rows: (b, n, R, pack * q_tile, C)."""
        return x[self.real].flatten(3, 4)

    def spread(self, x: Tensor) -> Tensor:
        """(b, n, R, pack * q_tile, C) to (b, n, R, pack, q_tile, C)."""
        return x.unflatten(3, (self.heads.shape[1], -1))

    def scores(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """(b, n, R, pack * q_tile, K) scores, -inf where hidden, and the slope of softcap."""
        scores, slope = (self.query * inputs.scale) @ self.key.mT, None
        if inputs.softcap is not None:
            bent = torch.tanh(scores / inputs.softcap)
            scores, slope = inputs.softcap * bent, 1 - bent * bent
        if inputs.bias is not None:
            scores = scores + self._bias(inputs.bias, inputs).to(scores.dtype)
        if self.hidden is not None:
            hidden = self.hidden.repeat(1, self.heads.shape[1], 1)
            scores = scores.masked_fill_(hidden, -torch.inf)
        return scores, slope

    def _bias_at(self, shape: torch.Size, inputs: Inputs) -> tuple[Tensor, ...]:
        """Index of each score in a bias of this shape, axes of size 1 shared."""
        at = (*self.real, self.k_index)
        b, h, q = (x[..., None] for x in at[:3])
        k = at[3][None, None, :, None, None, :]
        if inputs.bias_first is not None:
            places = q + inputs.key.shape[2] - inputs.query.shape[2]
            k = entries(inputs.bias_first, shape[3], places, k)
        return tuple(i if size > 1 else torch.zeros_like(i) for i, size in zip((b, h, q, k), shape))

    def _bias(self, bias: Tensor, inputs: Inputs) -> Tensor:
        full = bias[self._bias_at(bias.shape, inputs)]
        shape = (len(self.batches), *self.heads.shape[:1], len(self.q_index), self.heads.shape[1])
        return full.expand(*shape, self.q_index.shape[1], self.k_index.shape[1]).flatten(3, 4)

    def add_bias(self, dbias: Tensor, ds: Tensor, inputs: Inputs) -> None:
        """Add score gradients to the bias's."""
        at = self._bias_at(dbias.shape, inputs)
        dbias.index_put_(at, self.spread(ds), accumulate=True)

    def add_rows(self, dq: Tensor, part: Tensor) -> None:
        """Add (b, n, R, pack * q_tile, D) to the gradient of the queries."""
        dq.index_put_(self.real, self.spread(part), accumulate=True)

    def add_keys(self, dk: Tensor, part: Tensor) -> None:
        """Add (b, n, R, K, C) to the gradient of keys or values."""
        b, n = self.batches[:, None, None, None], self.kv_heads[None, :, None, None]
        dk.index_put_((b, n, self.k_index[None, None]), part, accumulate=True)


def chunks(inputs: Inputs, layout: Layout, work: torch.dtype) -> Iterator[_Chunk]:
    """The layout's query tiles, a few at a time, each with all the keys of its list."""
    batch, q_heads = inputs.query.shape[:2]
    group = q_heads // inputs.key.shape[1]
    layout_batches, layout_heads = layout.groups
    every = torch.arange(batch, device=layout.device)
    for b in range(layout_batches):
        batches = every if layout_batches == 1 else every[b : b + 1]
        for h in range(layout_heads):
            size = q_heads // layout_heads
            heads = torch.arange(h * size, (h + 1) * size, device=layout.device)
            pack = group if size % group == 0 else size if group % size == 0 else 1
            heads = heads.reshape(-1, pack)
            index = b * layout_heads + h
            for some_batches, some_heads in _pieces(layout, batches, heads, index):
                yield from _group_chunks(
                    inputs, layout, work, some_batches, some_heads, group, index
                )


def _pieces(
    layout: Layout, batches: Tensor, heads: Tensor, index: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """All batch entries and heads at once, or one by one where the longest list is too long."""
    ptr = layout.ptr.reshape(-1, layout.q_tiles + 1)[index]
    longest = int((ptr[1:] - ptr[:-1]).max()) if layout.q_tiles else 0
    area = longest * layout.q_tile * layout.kv_tile
    if len(batches) * heads.numel() * area <= _BUDGET:
        yield batches, heads
        return
    for batch in batches.split(1):
        for some in heads.split(1):
            yield batch, some


def _group_chunks(
    inputs: Inputs,
    layout: Layout,
    work: torch.dtype,
    batches: Tensor,
    heads: Tensor,
    group: int,
    index: int,
) -> Iterator[_Chunk]:
    kv_heads = heads[:, 0] // group
    ptr = layout.ptr.reshape(-1, layout.q_tiles + 1)[index]
    lengths = (ptr[1:] - ptr[:-1]).cpu()
    order = torch.argsort(lengths, stable=True)
    order = order[lengths[order] > 0]
    unit = len(batches) * heads.numel() * layout.q_tile * layout.kv_tile
    start = 0
    while start < len(order):
        stop = start + 1
        while (
            stop < len(order) and (stop + 1 - start) * int(lengths[order[stop]]) * unit <= _BUDGET
        ):
            stop += 1
        rows = order[start:stop].to(layout.device)
        start = stop
        yield _chunk(inputs, layout, work, batches, heads, kv_heads, ptr, rows)


def _chunk(
    inputs: Inputs,
    layout: Layout,
    work: torch.dtype,
    batches: Tensor,
    heads: Tensor,
    kv_heads: Tensor,
    ptr: Tensor,
    rows: Tensor,
) -> _Chunk:
    counts = ptr[rows + 1] - ptr[rows]
    slots = torch.arange(int(counts.max()), device=layout.device)
    listed = slots < counts[:, None]
    entries = (ptr[rows][:, None] + slots).where(listed, ptr[rows][:, None])
    keys = layout.entry_keys(entries.reshape(-1)).reshape(len(rows), -1)
    queries = layout.entry_queries(ptr[rows])
    hidden = _hidden(layout, entries, listed, keys, queries)
    v_index = rows[:, None] * layout.q_tile + torch.arange(layout.q_tile, device=layout.device)
    chunk = _Chunk(
        batches, heads, kv_heads, queries.clamp_min(0), keys.clamp_min(0), v_index, hidden,
        inputs.query, inputs.key, inputs.value,
    )  # fmt: skip
    b, n = batches[:, None, None, None], kv_heads[None, :, None, None]
    chunk.query = chunk.rows(inputs.query).to(work)
    chunk.key = inputs.key[b, n, chunk.k_index[None, None]].to(work)
    chunk.value = inputs.value[b, n, chunk.k_index[None, None]].to(work)
    return chunk


def _hidden(
    layout: Layout, entries: Tensor, listed: Tensor, keys: Tensor, queries: Tensor
) -> Tensor | None:
    """(R, q_tile, K) elements that don't attend; None if all do."""
    whole = bool((layout.kinds[entries] == FULL).all()) and bool(listed.all())
    if whole and bool((keys >= 0).all()) and bool((queries >= 0).all()):
        return None
    seen = layout.entry_mask(entries.reshape(-1)).unflatten(0, entries.shape)
    seen = seen & listed[:, :, None, None]
    return ~seen.transpose(1, 2).flatten(2)
