"""What the two linear-time variants share: chunks of keys, running sums, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate.ops import AttentionOutput
from foveate.ops.errors import InputError
from foveate.parts.context import Context
from foveate.parts.form import is_causal_or_full
from foveate.parts.tokens import queries_that_are, tokens_of


class Seen(NamedTuple):
    """Whether later keys are seen, and (1 or B, n) bool of real new tokens; None is all real."""

    causal: bool
    real: Tensor | None


def seen(name: str, q: Tensor, k: Tensor, past: int, ctx: Context) -> Seen:
    """Read the context of a call with n new tokens q (B, Hq, n, D), k (B, Hkv, n, D).

    Raises:
        InputError: other lengths, a mask for other ones, something that only a softmax over pairs
            has, or a mask that is neither causal nor full, apart from padding.
    """
    if q.shape[2] != k.shape[2]:
        raise InputError(
            f"{name}: it keeps running sums, so queries and keys are the same tokens; got "
            f"{q.shape[2]} and {k.shape[2]}. Decode with the state that foveate.Attention makes."
        )
    for what in ("softcap", "sink_logits", "bias"):
        if getattr(ctx, what) is not None:
            raise InputError(f"{name} has no {what}: it never forms the scores of pairs.")
    if ctx.dropout:
        raise InputError(f"{name} has no dropout: it never forms the weights of pairs.")
    if ctx.mask is None:
        if past:
            raise InputError(
                f"{name}: with a cache it runs step by step, which is causal; expected "
                "mask=causal()."
            )
        return Seen(False, None)
    if ctx.mask.spec == "causal()":
        return Seen(True, None)
    ctx.mask._check(q.shape[2], past + k.shape[2])
    keys = k[:, :, :1].expand(-1, -1, past + k.shape[2], -1)
    tokens = tokens_of(q, keys, ctx)
    if not is_causal_or_full(ctx, tokens) or (past and not tokens.causal):
        raise InputError(
            f"{name} sums over all earlier tokens, or over all of them, but the mask is neither "
            "causal nor full (a sliding window or packed documents, for example); call it per "
            "document."
        )
    real = queries_that_are(tokens)
    return Seen(tokens.causal, None if bool(real.all()) else real)


def in_chunks(
    run: Callable[..., tuple[Tensor, ...]], sums: tuple[Tensor, ...], rows: tuple[Any, ...],
    axes: tuple[int, ...], chunk: int,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:  # fmt: skip
    """Run over chunks of the tokens, handing sums on; backward runs each chunk again.

    Args:
        run: takes the sums and a chunk of every tensor in `rows` (None stays None), and returns
            the chunk's output and the new sums.
        sums: to begin with.
        rows: tensors with the tokens on the axis that `axes` gives.
        axes: likewise.
        chunk: tokens at a time.
    """
    length = rows[0].shape[axes[0]]
    outs = []
    # Split, not sliced: the gradient of each slice would be as long as the whole.
    parts = [None if x is None else x.split(chunk, axis) for x, axis in zip(rows, axes)]
    for at in range(-(-length // chunk)):
        some = [None if part is None else part[at] for part in parts]
        if torch.is_grad_enabled() and length > chunk:
            made = checkpoint(run, *sums, *some, use_reentrant=False, preserve_rng_state=False)
        else:
            made = run(*sums, *some)
        assert isinstance(made, tuple)
        out, *after = made
        outs.append(out)
        sums = tuple(after)
    return outs, sums


def of_nothing(q: Tensor, v: Tensor) -> AttentionOutput:
    """The output of no tokens."""
    return without_lse(v.new_zeros(*q.shape[:3], v.shape[3]))


def without_lse(out: Tensor) -> AttentionOutput:
    """An output that no log-sum-exp goes with: NaN, so that a merge by it shows."""
    lse = out.new_full(out.shape[:3], torch.nan, dtype=torch.float32)
    return AttentionOutput(out, lse)


def wide(x: Tensor) -> Tensor:
    """In fp32, or x's dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
