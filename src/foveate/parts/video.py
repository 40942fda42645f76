"""What attentions over a whole image or video share: its grid, and tokens (text) beside it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.parts.context import Context
from foveate.parts.form import is_causal_or_full
from foveate.parts.grid_blocks import Cut, Grid
from foveate.parts.tokens import Tokens, tokens_of


def grid_of(
    owner: str, shape: Grid | None, beside: int, q: Tensor, k: Tensor, ctx: Context
) -> Grid:
    """The grid of a call: `shape`, else that of the context.

    Args:
        owner: who asks, for the errors.
        shape: given to the method.
        beside: tokens beside the grid's.
        q: (B, Hq, Lq, D).
        k: (B, Hkv, Lkv, D).
        ctx: of the call.

    Raises:
        InputError: there is none, or queries and keys aren't its tokens.
    """
    grid = shape if shape is not None else ctx.grid
    if grid is None or not 1 <= len(grid) <= 3:
        raise InputError(
            f"{owner} needs the grid of the tokens, such as frames x rows x columns; give shape= "
            "or Context(grid=...)."
        )
    for name, x in (("queries", q), ("keys", k)):
        if x.shape[2] != math.prod(grid) + beside:
            more = f" and {beside} beside it" if beside else ""
            raise InputError(
                f"{owner}: a grid of {' x '.join(map(str, grid))} tokens{more} doesn't make "
                f"{x.shape[2]} {name}; it is self attention over a whole video (no decoding), "
                "with before= and after= tokens beside it."
            )
    return tuple(grid)


def video_tokens(owner: str, q: Tensor, k: Tensor, ctx: Context) -> Tokens:
    """The tokens of a call in which everyone sees everyone, padding aside.

    Raises:
        InputError: another mask, or tokens that were moved.
    """
    tokens = tokens_of(q, k, ctx)
    if (tokens.causal and q.shape[2] > 1) or not is_causal_or_full(ctx, tokens):
        raise InputError(
            f"{owner} is defined for attention to everything, padding aside, but the mask is "
            f"{ctx.mask!r} or tokens were moved; leave the mask, or use moba, which is causal."
        )
    if ctx.bias is not None:
        raise InputError(f"{owner} doesn't look at biases, so it would choose wrongly with one.")
    return tokens


def grid_keys(cut: Cut, before: int, tokens: Tokens) -> Tensor:
    """(B', C, W) index of the real tokens of each of the grid's blocks, in front; -1 is none."""
    table = torch.where(cut.tokens >= 0, cut.tokens + before, -1).to(tokens.k_real.device)
    return _real(table, tokens)


def keys_beside(grid: Grid, before: int, after: int, tokens: Tokens) -> Tensor:
    """(B', T) index of the real tokens beside the grid, in front; -1 is none."""
    end = before + math.prod(grid)
    every = torch.arange(end + after, device=tokens.k_real.device)
    return _real(torch.cat((every[:before], every[end:])), tokens)


def _real(table: Tensor, tokens: Tokens) -> Tensor:
    there = tokens.k_real[:, table.clamp_min(0)] & (table >= 0)
    front = torch.argsort(~there, dim=-1, stable=True)
    keys = table.expand_as(front).gather(-1, front)
    return keys.masked_fill(~there.gather(-1, front), -1)
