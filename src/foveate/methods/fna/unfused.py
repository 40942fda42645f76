"""Unfused neighborhood attention: products over tiles of windows, with the weights in memory.

Three operators, each a dense product of a tile of queries and the box of keys that its windows
hold, from or to which the windows' weights A are picked: (B, H, T, t, l) for T tiles of t queries
and l = prod(window) keys of each,

    PN  A_it = q_i . k_j(i, t)         scores, and in the backward dP from dO and V
    NN  y_i  = sum_t A_it x_j(i, t)    output from P and V, and dQ from dS and K
    IN  x_j  = sum of A_it y_i over all (i, t) with j(i, t) = j
                                       dV from P and dO, and dK from dS and Q

Not symmetric: how many windows hold a key differs, so IN is no NN. Softmax and a bias for relative
positions, which the fused form doesn't have, stand between.

Source: Hassani et al. 2024, arXiv 2403.04690, section 3.1 (here for any number of axes).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.methods.fna.windows import Windows, check, windows
from foveate.ops import AttentionOutput, neighborhood
from foveate.ops.errors import InputError

TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}
_BUDGET = 1 << 22  # elements of a dense product at a time


def unfused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: neighborhood,
    scale: float | None = None,
    rpb: Tensor | None = None,
) -> AttentionOutput:
    """Attention over the windows of a grid, tokens row by row; differentiable once.

    torch.compile breaks its graph here and runs it as it is, so fullgraph isn't to be had; the
    fused form has that.

    Args:
        q: (B, Hq, N, D).
        k: (B, Hkv, N, D), Hq a multiple of Hkv.
        v: (B, Hkv, N, Dv).
        mask: over the N tokens.
        scale: factor on the scores; None is D ** -0.5.
        rpb: (Hq, 2 k_1 - 1, ...), added to a score by key - query + window - 1 on each axis, in
            coordinates of the residue where there is dilation; not for causal axes.

    Returns:
        out (B, Hq, N, Dv), lse (B, Hq, N).

    Raises:
        InputError: batches, lengths, heads, dtypes or the bias don't fit.
    """
    if torch.compiler.is_compiling():  # its tables are built by value, which no graph holds
        return torch.compiler.disable(unfused)(q, k, v, mask, scale, rpb)
    check("unfused", q, k, v, mask)
    shared = q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    own = windows(mask, TILES[len(mask.axes)])
    scores = _PN.apply(q * scale, k, own)
    if rpb is not None:
        scores = scores + _bias(rpb, mask, own, q.shape[1])
    if own.valid is not None:
        scores = scores.masked_fill(~own.valid, -torch.inf)
    work = torch.promote_types(q.dtype, torch.float32)
    lse = scores.to(work).logsumexp(-1)
    weights = torch.softmax(scores, -1, dtype=work).to(v.dtype)
    real = own.queries >= 0
    in_tiles = torch.empty_like(q[..., 0], dtype=work)
    return AttentionOutput(
        _NN.apply(weights, v, own), in_tiles.index_copy(2, own.queries[real], lse[:, :, real])
    )


def _bias(rpb: Tensor, mask: neighborhood, own: Windows, heads: int) -> Tensor:
    """(H, T, t, l) entries of the table."""
    want = (heads, *(2 * axis.window - 1 for axis in mask.axes))
    if tuple(rpb.shape) != want:
        raise InputError(f"unfused(rpb): expected shape {want}, got {tuple(rpb.shape)}.")
    if any(axis.causal for axis in mask.axes):
        raise InputError("unfused(rpb): relative positions have no bias on causal axes.")
    return rpb.flatten(1)[:, own.offset.long()]


def _chunks(own: Windows, x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Some tiles at a time: which, queries (c, t) clamped, which are real, box (c, b), inside."""
    count = x.shape[0] * x.shape[1] * own.queries.shape[1] * own.box.shape[1]
    step = max(1, _BUDGET // max(1, count))
    for first in range(0, len(own.queries), step):
        part = slice(first, first + step)
        queries = own.queries[part]
        inside = own.inside[part].long().expand(*x.shape[:2], -1, -1, -1)
        yield part, queries.clamp_min(0), queries >= 0, own.box[part], inside


def _pn(q: Tensor, k: Tensor, own: Windows) -> Tensor:
    weights = q.new_empty(*q.shape[:2], *own.inside.shape)
    for part, queries, _, box, inside in _chunks(own, q):
        dense = q[:, :, queries] @ k[:, :, box].mT  # (B, H, c, t, b)
        torch.gather(dense, -1, inside, out=weights[:, :, part])
    return weights.masked_fill_((own.queries < 0)[..., None], 0.0)


def _dense(weights: Tensor, box: Tensor, inside: Tensor) -> Tensor:
    """Weights of windows in their boxes, zero elsewhere: (B, H, c, t, b)."""
    dense = weights.new_zeros(*weights.shape[:4], box.shape[1])
    # A key past the end of a cut window stands where another one may: add, its weight is 0.
    return dense.scatter_add_(-1, inside, weights)


def _nn(weights: Tensor, x: Tensor, own: Windows) -> Tensor:
    y = x.new_empty(*x.shape[:3], x.shape[-1])
    for part, queries, real, box, inside in _chunks(own, weights):
        some = _dense(weights[:, :, part], box, inside) @ x[:, :, box]
        y[:, :, queries[real]] = some[:, :, real]
    return y


def _in(weights: Tensor, y: Tensor, own: Windows) -> Tensor:
    x = torch.zeros_like(y)
    for part, queries, real, box, inside in _chunks(own, weights):
        some = _dense(weights[:, :, part], box, inside).mT @ (y[:, :, queries] * real[..., None])
        x.index_add_(2, box.flatten(), some.flatten(2, 3))
    return x


class _PN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, own: Windows) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.own = own
        return _pn(q, k, own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k = ctx.saved_tensors
        return _nn(grad, k, ctx.own), _in(grad, q, ctx.own), None


class _NN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, x: Tensor, own: Windows) -> Tensor:
        ctx.save_for_backward(weights, x)
        ctx.own = own
        return _nn(weights, x, own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, x = ctx.saved_tensors
        return _pn(grad, x, ctx.own), _in(weights, grad, ctx.own), None
