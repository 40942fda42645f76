"""From transformers' attention_mask and position_ids to a mask and positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops import Mask, causal, documents, padding
from foveate.ops.errors import InputError


class Seen(NamedTuple):
    """Who sees whom.

    mask, None where everyone sees everyone; positions of the queries (B, Lq) and of all keys
    (B, Lkv), None where index is position; real (B, Lq) bool, None where all new tokens are.
    """

    mask: Mask | None
    q_positions: Tensor | None = None
    kv_positions: Tensor | None = None
    real: Tensor | None = None


def seen_by(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    batch: int,
    past: int,
    new: int,
    *,
    both_ways: bool = False,
) -> Seen:
    """What `new` tokens behind `past` cached ones see.

    Args:
        attention_mask: (B, past + new), 1 for real tokens: padding on either side.
        position_ids: (B, new) or (1, new) as transformers makes them: counted from each row's first
            real token. Without padding and a cache they may start again from 0, where a packed
            sequence begins.
        batch: B.
        past: tokens in the cache.
        new: tokens now.
        both_ways: tokens see later ones too, as in an encoder.

    Raises:
        InputError: another kind of mask, holes between real tokens, or other positions.
    """
    length = past + new
    if attention_mask is None:
        return Seen(_by_position(position_ids, past, new, both_ways))
    if attention_mask.dim() != 2 or tuple(attention_mask.shape) != (batch, length):
        raise InputError(
            f"attention_mask: expected ({batch}, {length}) with 1 for real tokens, those in the "
            f"cache included, got {tuple(attention_mask.shape)}."
        )
    real = attention_mask.bool()
    if bool(real.all()):
        return Seen(_by_position(position_ids, past, new, both_ways))
    first, counts = real.int().argmax(1), real.sum(1)
    index = torch.arange(length, device=real.device)
    if not torch.equal(real, (index >= first[:, None]) & (index < (first + counts)[:, None])):
        raise InputError(
            "attention_mask: there are holes between real tokens; expected padding in front of "
            "them or behind them only."
        )
    positions = index - first[:, None]
    _check_padded(position_ids, positions[:, past:], real[:, past:])
    mask = padding(counts) if both_ways else causal() & padding(counts)
    return Seen(mask, positions[:, past:], positions, real=real[:, past:])


def _check_padded(position_ids: Tensor | None, positions: Tensor, real: Tensor) -> None:
    """Refuse positions of real tokens that aren't those that padding gives them."""
    if position_ids is None:
        return
    fits = position_ids.shape[-1] == positions.shape[1]
    if not fits or bool(((position_ids != positions) & real).any()):
        raise InputError(
            "position_ids: with padding expected 0, 1, 2, ... from each row's first real token "
            "(what stands on the padding doesn't count); leave them out, or pack without padding."
        )


def _by_position(position_ids: Tensor | None, past: int, new: int, both_ways: bool) -> Mask | None:
    order = None if both_ways else causal()
    if position_ids is None:
        return order
    ids = position_ids.reshape(-1, position_ids.shape[-1])
    plain = torch.arange(past, past + new, device=ids.device)
    if ids.shape[-1] == new and bool((ids == plain).all()):
        return order
    steps = ids.diff(dim=1)
    if (
        past
        or len(ids) != 1
        or int(ids[0, 0])
        or not bool(((steps == 1) | (ids[:, 1:] == 0)).all())
    ):
        raise InputError(
            "position_ids: expected 0, 1, 2, ... (starting again from 0 for each packed sequence, "
            "in a batch of one and without a cache); for padding give an attention_mask."
        )
    starts = (ids[0] == 0).nonzero()[:, 0].tolist()
    own = documents([*starts, new])
    return own if order is None else order & own
