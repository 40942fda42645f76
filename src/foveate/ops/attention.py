"""The core op: exact softmax attention over whatever a mask or a layout allows."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops import library
from foveate.ops.backends.base import Inputs
from foveate.ops.bias import RelativeBias
from foveate.ops.check import (
    check_bias,
    check_mask,
    check_numbers,
    check_sinks,
    check_tensors,
)
from foveate.ops.dispatch import BACKENDS, Explanation, choose, explanation, forced
from foveate.ops.errors import InputError
from foveate.ops.layout import Layout
from foveate.ops.masks import Mask
from foveate.ops.types import AttentionOutput

_TENSORS = (Tensor, torch.nn.Parameter)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    layout: Layout | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | RelativeBias | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> AttentionOutput:
    """Softmax attention with its log-sum-exp, exact, visiting only what may attend.

    Args:
        query: (B, Hq, Lq, D).
        key: (B, Hkv, Lkv, D); Hq is a multiple of Hkv. Keys and values may be float8_e4m3fn or
            float8_e5m2, as a cache may keep them, beside wider queries, without a gradient of
            their own; one factor that all keys were divided by belongs into `scale`, one of all
            values onto `out`.
        value: (B, Hkv, Lkv, Dv), of the keys' dtype.
        mask: a mask such as `causal() & window(1023, 0)`, or a bool tensor (..., Lq, Lkv), True =
            attend; None is everything. Causal is aligned bottom-right: the last query sees the last
            key.
        layout: in place of a mask, the tiles to visit.
        scale: factor on the scores; None is D ** -0.5 (0.0 is a value).
        softcap: c in c * tanh(score / c), before bias and mask.
        sink_logits: (Hq,), one more logit in each row's sum, without a value: rows sum to less
            than 1.
        bias: added to the scores, broadcastable to (B, Hq, Lq, Lkv), per key if its Lq axis is 1;
            or a `RelativeBias`, such as `alibi`, which no Lq x Lkv tensor holds.
        dropout: probability of dropping an attention weight; the lse doesn't see it.
        backend: "auto", or one of `foveate.ops.available()`; a named one is never replaced.

    Returns:
        out (B, Hq, Lq, Dv) in the queries' dtype and lse (B, Hq, Lq), natural log in fp32; a row
        that attends to nothing has out 0 and lse -inf. Both are differentiable. A query or key that
        isn't finite reaches the rows that see it and no other; a value, as in torch's own, any row
        of its heads, since 0 times NaN is NaN.

    Raises:
        InputError: shapes, dtypes, devices or values don't fit.
        BackendError: no backend, or not the one named, can run the call; it lists the reasons.
    """
    inputs = _checked(query, key, value, mask, layout, scale, softcap, sink_logits, bias, dropout)
    if inputs.dropout and backend == "auto":
        backend = "reference"  # the only one that drops single weights
    if backend in BACKENDS and BACKENDS[backend].composite:
        result = forced(inputs, backend).forward(inputs)
    else:
        chosen = None if backend == "auto" else forced(inputs, backend)
        if _plain(inputs):
            if inputs.layout is not None:
                inputs.layout.checked()
            result = (chosen or choose(inputs, backend)).forward(inputs)
            return result if sink_logits is None else with_sinks(result, sink_logits)
        packed = library.pack(inputs.mask, inputs.layout)
        result = AttentionOutput(
            *torch.ops.foveate.attention(
                query,
                key,
                value,
                inputs.bias,
                *packed,
                inputs.scale,
                softcap,
                inputs.bias_first,
                backend,
            )
        )
    return result if sink_logits is None else with_sinks(result, sink_logits)


def _plain(inputs: Inputs) -> bool:
    """Whether nothing watches this call, so that it need not go through torch's dispatcher.

    The operator is for autograd, for tracing, and for modes and tensor classes that intercept
    operators. Without them it would only cost time, which is what counts in decoding.
    """
    return (
        not inputs.needs_grad
        and not torch.compiler.is_compiling()
        and all(type(x) in _TENSORS for x in (inputs.query, inputs.key, inputs.value))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )


def with_sinks(result: AttentionOutput, sink_logits: Tensor) -> AttentionOutput:
    """Put one more logit per head, without a value, into every row's sum.

    out' = out * sigmoid(lse - b), lse' = log(exp(lse) + exp(b)), b (Hq,) one for each query head.
    """
    b = sink_logits.to(result.lse.dtype)[None, :, None].expand_as(result.lse)
    empty = result.lse == -torch.inf
    lse = result.lse.masked_fill(empty, 0.0)
    share = torch.sigmoid(lse - b).masked_fill(empty, 0.0)
    out = (result.out * share[..., None]).to(result.out.dtype)
    return AttentionOutput(out, torch.where(empty, b, torch.logaddexp(lse, b)))


def with_key(
    result: AttentionOutput, score: Tensor, value: Tensor | None = None
) -> AttentionOutput:
    """Put one more key, which no mask hides, beside those of a result.

    out' = (e^lse out + e^score value) / (e^lse + e^score), lse' = log(e^lse + e^score).

    Args:
        result: out (B, Hq, Lq, Dv) and lse (B, Hq, Lq).
        score: (B, Hq, Lq), the key's score with each query, scale included.
        value: broadcastable to out; None is 0, which makes the key a sink of its own per query.
    """
    empty = result.lse == -torch.inf
    score = score.to(result.lse.dtype)
    lse = result.lse.masked_fill(empty, 0.0)
    share = torch.sigmoid(lse - score).masked_fill(empty, 0.0)[..., None]
    out = result.out * share
    if value is not None:
        rest = torch.sigmoid(score - lse).masked_fill(empty, 1.0)[..., None]
        out = out + rest * value.to(rest.dtype)
    total = torch.where(empty, score, torch.logaddexp(lse, score))
    return AttentionOutput(out.to(result.out.dtype), total)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    layout: Layout | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | RelativeBias | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Explanation:
    """Which backend `attention` would run for this very call, and why not each of the others."""
    inputs = _checked(query, key, value, mask, layout, scale, softcap, sink_logits, bias, dropout)
    return explanation(inputs, backend)


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor | None,
    layout: Layout | None,
    scale: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    bias: Tensor | RelativeBias | None,
    dropout: float,
) -> Inputs:
    check_tensors(query, key, value, narrow=True)
    mask = check_mask(mask, layout)
    if scale is None:
        if not query.shape[3]:
            raise InputError("Heads of size 0 have no default scale; give one, such as scale=1.0.")
        scale = query.shape[3] ** -0.5
    check_numbers(scale, softcap, dropout)
    if layout is not None:
        layout.check(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        if layout.device != query.device:
            layout = layout.to(query.device)
    if mask is not None:
        _check_fit(mask, query, key)
        if query.shape[2] == 1 and mask.spec == "causal()":
            mask = None  # the last query sees every key
    if sink_logits is not None:
        check_sinks(sink_logits, query)
    table, first = (None, None) if bias is None else check_bias(bias, query, key)
    needs_grad = torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (table is not None and table.requires_grad)
    )
    return Inputs(
        query, key, value, mask, layout, table, scale, softcap, dropout, needs_grad, first
    )  # fmt: skip


def _check_fit(mask: Mask, query: Tensor, key: Tensor) -> None:
    """Refuse a mask made for other lengths, batch sizes or heads."""
    mask._check(query.shape[2], key.shape[2])
    batches, heads = mask.groups()
    if batches not in (1, query.shape[0]):
        raise InputError(f"The mask is for a batch of {batches}, the call has {query.shape[0]}.")
    if query.shape[1] % heads:
        raise InputError(
            f"The mask has {heads} heads, which don't divide {query.shape[1]} query heads."
        )
