"""Attention with other weights than the softmax's, over a mask or a layout, never holding L x L.

out_i = sum_j w(s_i)_j v_j,   s_ij = softcap(scale * q_i . k_j) + bias_ij,

where w turns a row's scores into its weights: softpick, clipped softmax, sigmoids, sparsemax. It
visits the tiles that the layout lists and no others, each row with its whole list at once, as the
pure-torch backend of the core op does; the backward makes scores and weights again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.ops.backends.base import Inputs, lse_dtype
from foveate.ops.backends.blocks import chunks, resolved
from foveate.ops.bias import RelativeBias
from foveate.ops.check import check_bias, check_mask, check_numbers, check_tensors
from foveate.ops.errors import InputError
from foveate.ops.layout import Layout
from foveate.ops.masks import Mask

Weigh = Callable[[Tensor, Tensor], Tensor]
"""(scores, visible) -> weights, all (..., rows, keys): scores are 0 where a key isn't visible, and
whatever the function says there doesn't count."""


def weighted(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weigh: Weigh,
    mask: Mask | Tensor | None = None,
    *,
    layout: Layout | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | RelativeBias | None = None,
) -> Tensor:
    """Attention with the weights of `weigh`; differentiable once, in q, k, v and bias.

    Args:
        query: (B, Hq, Lq, D).
        key: (B, Hkv, Lkv, D); Hq is a multiple of Hkv.
        value: (B, Hkv, Lkv, Dv).
        weigh: from a row's scores to its weights, in fp32 at least; without parameters of its own.
        mask: as in `foveate.attention`; None is everything.
        layout: in place of a mask, the tiles to visit.
        scale: factor on the scores; None is D ** -0.5.
        softcap: c in c * tanh(score / c).
        bias: added to the scores, as in `foveate.attention`.

    Returns:
        (B, Hq, Lq, Dv); 0 for a row that sees nothing.

    Raises:
        InputError: shapes don't fit, or a layout that spreads a query's keys over several tiles.
    """
    check_tensors(query, key, value)
    mask = check_mask(mask, layout)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    check_numbers(scale, softcap, 0.0)
    if layout is not None:
        layout.check(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        layout = layout.to(query.device) if layout.device != query.device else layout
    elif mask is not None:
        mask._check(query.shape[2], key.shape[2])
    table, first = (None, None) if bias is None else check_bias(bias, query, key)
    call = Inputs(query, key, value, mask, layout, None, scale, softcap)
    found = resolved(call, gathers=False)
    if found.q_index is not None:
        raise InputError(
            "These weights need all keys of a query in one list, but this pattern puts queries in "
            "an order of its own and may list one several times; use a pattern such as full or "
            "sink-window."
        )
    if not query.numel():
        return value.new_zeros(*query.shape[:3], value.shape[3])
    out: Tensor = _run(query, key, value, table, weigh, found, scale, softcap, first)
    return out


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        weigh: Weigh,
        layout: Layout,
        scale: float,
        softcap: float | None,
        first: int | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, bias)
        ctx.call = weigh, layout, scale, softcap, first
        inputs = Inputs(
            query, key, value, None, layout, bias, scale, softcap, bias_first=first
        )  # fmt: skip
        work = lse_dtype(query.dtype)
        rows = layout.q_tiles * layout.q_tile
        out = query.new_zeros(*query.shape[:2], rows, value.shape[3], dtype=work)
        for chunk in chunks(inputs, layout, work):
            scores, _ = chunk.scores(inputs)
            weights = _weights(weigh, scores, scores == -torch.inf)
            out[chunk.virtual] = chunk.spread(weights @ chunk.value)
        return out[:, :, : query.shape[2]].to(query.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, bias = ctx.saved_tensors
        weigh, layout, scale, softcap, first = ctx.call
        inputs = Inputs(
            query, key, value, None, layout, bias, scale, softcap, bias_first=first
        )  # fmt: skip
        work = lse_dtype(query.dtype)
        do = grad.to(work)
        dq, dk, dv = (torch.zeros_like(x, dtype=work) for x in (query, key, value))
        dbias = None if bias is None else torch.zeros_like(bias, dtype=work)
        for chunk in chunks(inputs, layout, work):
            scores, slope = chunk.scores(inputs)
            hidden = scores == -torch.inf
            with torch.enable_grad():
                leaf = scores.masked_fill(hidden, 0.0).requires_grad_()
                weights = _weights(weigh, leaf, hidden)
            g = chunk.rows(do)
            (ds,) = torch.autograd.grad(weights, leaf, g @ chunk.value.mT)
            ds = ds.masked_fill(hidden, 0.0)
            chunk.add_keys(dv, weights.detach().mT @ g)
            if dbias is not None:
                chunk.add_bias(dbias, ds, inputs)
            ds = ds * scale if slope is None else ds * slope * scale
            chunk.add_keys(dk, ds.mT @ chunk.query)
            chunk.add_rows(dq, ds @ chunk.key)
        like = zip((dq, dk, dv, dbias), (query, key, value, bias))
        return *(None if d is None or x is None else d.to(x.dtype) for d, x in like), *[None] * 5


@torch.compiler.disable
def _run(*call: Any) -> Any:
    return _Weighted.apply(*call)


def _weights(weigh: Weigh, scores: Tensor, hidden: Tensor) -> Tensor:
    """Weights of a chunk, 0 where hidden; a row without keys has none."""
    return weigh(scores.masked_fill(hidden, 0.0), ~hidden).masked_fill(hidden, 0.0)
