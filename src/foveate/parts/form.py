"""Whether a call's mask is plain: all real tokens, or all that aren't later.

For methods that reorder or estimate whole halves of the attention matrix, and so have nothing to
say of a mask's finer shape.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.parts.attention import EVERYTHING, remember
from foveate.parts.context import Context
from foveate.parts.tokens import Tokens, tokens_of

_PLAIN = re.compile(r"(?:causal\(\)|window\(-1, -1\)|padding\(\[[\d, ]*\]\)|[& ()])+")
_ROWS = 256


def is_causal_or_full(ctx: Context, tokens: Tokens) -> bool:
    """Whether every real query sees all real keys, or all that aren't later.

    Told by the mask's expression where that says it, else element by element, a few rows at a time,
    once for all layers of a forward (`ctx.store`).
    """
    mask = EVERYTHING if ctx.mask is None else ctx.mask
    if not tokens.regular:
        return False
    if _PLAIN.fullmatch(mask.spec):
        return True
    batches = max(len(tokens.q_real), mask.groups()[0])
    lengths = (tokens.q_real.shape[1], tokens.k_real.shape[1])

    def look() -> bool:
        return all(
            _plain(ctx, tokens, b, h) for b in range(batches) for h in range(mask.groups()[1])
        )

    return remember(ctx, (is_causal_or_full, mask, lengths), look)


def sees_later(ctx: Context, tokens: Tokens) -> bool:
    """Under a plain mask: whether a token sees later ones, so that the form isn't the causal one.

    That is, whether the first real key's place sees the last one. A sequence of one key is both.
    """
    mask = ctx.mask
    if mask is None or not tokens.causal:
        return True

    def look() -> bool:
        for b in range(max(len(tokens.k_real), len(tokens.k_pos))):
            at = tokens.k_pos[b if len(tokens.k_pos) > 1 else 0]
            at = at[tokens.k_real[b if len(tokens.k_real) > 1 else 0]]
            if len(at) > 1 and not bool(mask._element(at[:1], at[-1:], b, 0)):
                return False
        return True

    return remember(ctx, (sees_later, mask, tokens.k_real.shape[1], tokens.k_real.device), look)


def check_prompt(method: str, tokens: Tokens) -> None:
    """Refuse a prompt whose padding would stand between it and what follows.

    Raises:
        InputError: padding after a real token.
    """
    real = tokens.q_real
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise InputError(
            f"{method} goes on from the prompt's last token, but some sequence ends with padding; "
            "with a cache put padding on the left."
        )


def check_step(method: str, q: Tensor, k: Tensor, ctx: Context, past: int) -> None:
    """Refuse new tokens, q (B, H, n, D) and k, that don't see all real ones up to themselves.

    Raises:
        InputError: another mask, or padding among them.
    """
    single = q.shape[2] == 1
    if (ctx.mask is None and single) or (ctx.mask is not None and ctx.mask.spec == "causal()"):
        return
    every = k.new_empty(1).expand(*k.shape[:2], past + q.shape[2], k.shape[3])
    tokens = tokens_of(q, every, ctx)
    if ctx.mask is None or not (tokens.causal and is_causal_or_full(ctx, tokens)):
        raise InputError(
            f"{method} decodes under a causal mask (padding aside), one in which every token sees "
            f"all before it; expected mask=causal(), got {ctx.mask!r}."
        )
    if ctx.real is not None and not bool(ctx.real.all()):
        raise InputError(f"{method}: padding among new tokens after a prompt; leave it out.")


def _plain(ctx: Context, tokens: Tokens, b: int, h: int) -> bool:
    assert ctx.mask is not None
    q, k, q_real, k_real = (
        x[b if len(x) > 1 else 0]
        for x in (tokens.q_pos, tokens.k_pos, tokens.q_real, tokens.k_real)
    )
    q, k = q[q_real], k[k_real]
    for rows in q.split(_ROWS):
        seen = ctx.mask._element(rows[:, None], k, b, h)
        want = k <= rows[:, None] if tokens.causal else torch.ones_like(seen)
        if not torch.equal(seen.expand_as(want), want):
            return False
    return True
