"""Exact tensor attention by blocks: never an n x n table, let alone n x n x n.

    A = exp(scale Q (K1 (x) ... (x) Km)^T),  D = diag(A 1),  out = D^-1 A (V1 (x) ... (x) Vm)

with (x) the column-wise Kronecker product: row (j1, ..., jm), column l is prod_s Ks[js, l]. Order k
has m = k - 1 keys. For a fixed jm its value factors out, and its key goes to the query:

    out_i = sum_jm exp(lse_{i,jm} - lse_i) (out_{i,jm} * Vm[jm]),
    lse_i = log sum_jm exp lse_{i,jm}

where (out, lse)_{i,jm} is attention of one order less for the query q_i * Km[jm], and at the end
ordinary attention: the core op. Blocks of jm come one after the other; the backward runs each
again, with p_{i,jm} = exp(lse_{i,jm} - lse_i) and

    dlse_{i,jm} = p_{i,jm} (dout_i . (out_{i,jm} * Vm[jm]) - dout_i . out_i + dlse_i)

A query sees a tuple if the mask lets it see each of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.ops import AttentionOutput, Layout, Mask, attention, causal, merge
from foveate.ops.layout.build import build
from foveate.parts.attention import EVERYTHING, TILE

_QUERIES = 8192  # pseudo-queries of a block, about
_LEAST = 16


@dataclass(eq=False)
class Grounds:
    """What all blocks of a call share.

    Attributes:
        mask: who may see whom.
        at: (1 or B', Lq) positions of the queries.
        keys: (1 or B', n) positions of the tokens that keys and values stand for.
        scale: factor on the logits.
        symmetric: whether both keys and both values are the same, and the mask is causal or full:
            then only j1 <= j2 is run, with weights doubled off the diagonal.
        backend: of the core op.
        keep: whether blocks and layouts are kept for the backward and for the next call; together
            they are of the size of an n x n table, so not for long sequences.
    """

    mask: Mask
    at: Tensor
    keys: Tensor
    scale: float
    symmetric: bool = False
    backend: str = "auto"
    keep: bool = True
    _layouts: dict[Any, Layout | None] = field(default_factory=dict)
    _blocks: dict[Any, list[_Block]] = field(default_factory=dict)

    def seen(self, at: Tensor, cols: slice) -> Tensor:
        """Whether queries at (1 or B', N) see the keys `cols`: (B', H', N, cols)."""
        found = []
        for b in range(max(self.mask.groups()[0], len(at), len(self.keys))):
            q = at[b if len(at) > 1 else 0][:, None]
            k = self.keys[b if len(self.keys) > 1 else 0][None, cols]
            heads = range(self.mask.groups()[1])
            found.append(torch.stack([self.mask._element(q, k, b, h) for h in heads]))
        return torch.stack(found)

    def layout(self, name: tuple[int, ...], mask: Mask, at: Tensor, keys: Tensor) -> Layout | None:
        """Of pseudo-queries at (1 or B', N) and keys, kept by name; None where all see all."""
        if name in self._layouts:
            return self._layouts[name]
        made = None
        if mask.spec != EVERYTHING.spec:
            with torch.inference_mode(False):  # what is kept must serve training, too
                made = build(mask, at, keys, (TILE, TILE), None)
        if self.keep:
            self._layouts[name] = made
        return made

    def blocks(self, name: tuple[int, ...], at: Tensor) -> Iterable[_Block]:
        """The blocks of the last index, for queries at (1 or B', N); kept by name."""
        if not self.keep:
            return self._cut(at)
        if name not in self._blocks:
            self._blocks[name] = list(self._cut(at))
        return self._blocks[name]

    def _cut(self, at: Tensor) -> Iterator[_Block]:
        n = self.keys.shape[-1]
        size = max(_LEAST, _QUERIES // max(1, at.shape[-1]))
        for first in range(0, n, size):
            block = self._block(at, slice(first, min(first + size, n)))
            if block is not None:
                yield block

    @torch.inference_mode(False)
    def _block(self, at: Tensor, cols: slice) -> _Block | None:
        """The block of these columns; None if no query sees any."""
        seen = self.seen(at, cols)
        some = seen.any(-1).flatten(0, 1).any(0)
        if not bool(some.any()):
            return None
        rows = None if bool(some.all()) else some.nonzero()[:, 0]
        seen = seen if rows is None else seen[:, :, rows]
        return _Block(cols, rows, None if bool(seen.all()) else seen)


class _Block(NamedTuple):
    """A block of the last index: the queries that see any of it (None: all), and which of it."""

    cols: slice
    rows: Tensor | None
    seen: Tensor | None


def exact(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], grounds: Grounds
) -> AttentionOutput:
    """Tensor attention of order len(keys) + 1.

    Args:
        q: (B, Hq, Lq, D), in fp32 or wider.
        keys: each (B, Hkv, n, D).
        values: as many, each (B, Hkv, n, Dv).
        grounds: mask, positions, scale.

    Returns:
        out (B, Hq, Lq, Dv) and lse (B, Hq, Lq), over tuples; both differentiable once.
    """
    return AttentionOutput(*_attend(q, tuple(keys), tuple(values), grounds, grounds.at, ()))


def _attend(
    q: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    grounds: Grounds,
    at: Tensor,
    name: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    if len(keys) == 1:
        layout = grounds.layout(name, grounds.mask, at, grounds.keys)
        return attention(
            q, keys[0], values[0], layout=layout, scale=grounds.scale, backend=grounds.backend
        )
    return _Sum.apply(q, grounds, at, name, *keys, *values)


class _Sum(torch.autograd.Function):
    """The sum over the last index, of attention of one order less."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, grounds: Grounds, at: Tensor, name: tuple[int, ...], *kv: Tensor
    ) -> tuple[Tensor, Tensor]:
        out = q.new_zeros(*q.shape[:3], kv[-1].shape[3])
        total = AttentionOutput(out, q.new_full(q.shape[:3], -torch.inf))
        for block in grounds.blocks(name, at):
            inner, lse = _block(_rows(q, block.rows), kv, block, grounds, at, name)
            value = _heads(kv[-1][:, :, block.cols], q)
            whole = torch.logsumexp(lse, -1)
            share = torch.exp(lse - _finite(whole)[..., None])
            part = (share[..., None] * inner * value[:, :, None]).sum(3)
            total = merge([total, AttentionOutput(part, whole)], [None, block.rows])
        ctx.save_for_backward(q, at, total.out, total.lse, *kv)
        ctx.grounds, ctx.name = grounds, name
        return total.out, total.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, at, out, lse, *kv = ctx.saved_tensors
        grounds, name, m = ctx.grounds, ctx.name, len(kv) // 2
        dq = torch.zeros_like(q)
        dkv = [torch.zeros_like(x) for x in kv]
        slope = grad_lse - (grad_out * out).sum(-1)
        for block in grounds.blocks(name, at):
            own = [x.detach().requires_grad_() for x in (_rows(q, block.rows), *kv)]
            with torch.enable_grad():
                inner, part = _block(own[0], own[1:], block, grounds, at, name)
            g = _rows(grad_out, block.rows)[:, :, :, None]
            value = _heads(kv[-1][:, :, block.cols], q)
            share = torch.exp(part.detach() - _finite(_rows(lse, block.rows))[..., None])
            weighted = share[..., None] * g
            d_inner = weighted * value[:, :, None]
            d_value = (weighted * inner.detach()).sum(2)
            d_lse = (d_inner * inner.detach()).sum(-1) + share * _rows(slope, block.rows)[..., None]
            given = own[: 2 * m]  # the last value doesn't reach the inner attention
            found = torch.autograd.grad((inner, part), given, (d_inner, d_lse))
            _add(dq, found[0], block.rows)
            for total, grad in zip(dkv, found[1:]):
                total += grad
            dkv[-1][:, :, block.cols] += d_value.unflatten(1, (kv[-1].shape[1], -1)).sum(2)
        return dq, None, None, None, *dkv


def _block(
    q: Tensor,
    kv: Sequence[Tensor],
    block: _Block,
    grounds: Grounds,
    at: Tensor,
    name: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """For queries q (B, Hq, N, D) and each jm of the block: (B, Hq, N, T, Dv), (B, Hq, N, T).

    The lse is -inf where jm isn't seen; the factor Vm[jm] isn't in the output.
    """
    m = len(kv) // 2
    last = _heads(kv[m - 1][:, :, block.cols], q)
    pseudo = (q[:, :, :, None] * last[:, :, None]).flatten(2, 3)
    at = at if block.rows is None else at[:, block.rows]
    size = block.cols.stop - block.cols.start
    name = (*name, block.cols.start)
    if grounds.symmetric:
        out, lse = _lower(pseudo, kv, block.cols, grounds, at, name)
    else:
        at = at.repeat_interleave(size, -1)
        out, lse = _attend(pseudo, tuple(kv[: m - 1]), tuple(kv[m:-1]), grounds, at, name)
    out, lse = out.unflatten(2, (-1, size)), lse.unflatten(2, (-1, size))
    if block.seen is not None:
        seen = block.seen.repeat_interleave(q.shape[1] // block.seen.shape[1], 1)
        lse = lse.masked_fill(~seen, -torch.inf)
    return out, lse


def _lower(
    pseudo: Tensor,
    kv: Sequence[Tensor],
    cols: slice,
    grounds: Grounds,
    at: Tensor,
    name: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """The tuples j1 < j2, which stand for j2 < j1 as well, and j1 = j2."""
    k, _, v, _ = kv
    before = (grounds.keys[:, cols] - 1).repeat(1, at.shape[-1])
    layout = grounds.layout(name, causal() & grounds.mask, before, grounds.keys)
    pair = attention(pseudo, k, v, layout=layout, scale=grounds.scale, backend=grounds.backend)
    same = _heads(k[:, :, cols], pseudo).repeat(1, 1, at.shape[-1], 1)
    logit = (pseudo * same).sum(-1) * grounds.scale
    own = _heads(v[:, :, cols], pseudo).repeat(1, 1, at.shape[-1], 1)
    twice = AttentionOutput(pair.out, pair.lse + math.log(2.0))
    return merge([twice, AttentionOutput(own, logit)])


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[:, :, rows]


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """(B, Hkv, ...) for each query head."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _add(total: Tensor, part: Tensor, rows: Tensor | None) -> None:
    if rows is None:
        total += part
    else:
        total.index_add_(2, rows, part)


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, 0.0)
