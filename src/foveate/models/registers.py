"""Register tokens: learned tokens before every sequence, which no output stands for.

They give heads something to attend to that means nothing, so that no token of the text has to be
that sink (one is StreamingLLM's learned sink token, Xiao et al. 2023, arXiv 2309.17453, section
3.3; several are the registers of Darcet et al. 2023, arXiv 2309.16588). They are in front, also in
an encoder, where the paper puts them behind: that keeps padding behind all real tokens. A cache
holds them, once; its length, as `generate` is told it, counts the text alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.ops.errors import InputError


class Fronted(NamedTuple):
    """A call with its registers: x, attention_mask, position_ids, cached tokens, and how many of
    the first outputs are registers'.
    """

    x: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    past: int
    dropped: int


def registers_of(count: int, dim: int) -> nn.Embedding | None:
    """`count` learned tokens; None for none."""
    return nn.Embedding(count, dim) if count else None


def fronted(
    registers: nn.Embedding | None,
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past: int,
) -> Fronted:
    """The call with its registers in front, if no cache holds them yet.

    Args:
        registers: of the model.
        x: (B, n, dim), embeddings of the new tokens.
        attention_mask: (B, past + n) of the text, or None.
        position_ids: of the text, counted from each row's first real token.
        past: tokens of the text that a cache holds.

    Raises:
        InputError: padding in front of the text, or packed sequences, which would need registers
            of their own.
    """
    if registers is None:
        return Fronted(x, attention_mask, position_ids, past, 0)
    count, rows = registers.num_embeddings, x.shape[0]
    if attention_mask is not None:
        if attention_mask.dim() == 2 and not bool(attention_mask[:, 0].all()):
            raise InputError(
                "attention_mask: this model has register tokens in front of the text, so padding "
                "must be behind it; tokenise with padding_side='right'."
            )
        ones = attention_mask.new_ones(rows, count)
        attention_mask = torch.cat((ones, attention_mask), 1)
    if position_ids is not None:
        expected = torch.arange(past, past + x.shape[1], device=position_ids.device)
        plain = position_ids.shape[-1] == x.shape[1] and bool((position_ids == expected).all())
        if not plain and attention_mask is None:
            raise InputError(
                "position_ids: packed sequences can't share the register tokens of this model; "
                "give them as rows of a batch, padded behind."
            )
        if not plain:  # what stands on padding doesn't count, but real tokens must be in order
            real = attention_mask is not None and attention_mask[:, -x.shape[1] :].bool()
            if bool(((position_ids != expected) & real).any()):
                raise InputError(
                    "position_ids: expected 0, 1, 2, ... on real tokens; leave them out."
                )
        position_ids = None
    if past:
        return Fronted(x, attention_mask, position_ids, past + count, 0)
    front = registers.weight.to(x.dtype).expand(rows, -1, -1)
    return Fronted(torch.cat((front, x), 1), attention_mask, position_ids, 0, count)


def ids_behind(front: int, ids: Tensor | None) -> Tensor | None:
    """Ids (B, L) with -1 for each of `front` registers before them; None stays None."""
    return None if ids is None else functional.pad(ids, (front, 0), value=-1)
