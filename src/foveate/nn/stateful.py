"""Attentions with parameters or a state of their own: their sizes, and what they go with."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.parts import Heads, Stateful
from foveate.parts.projection import Positions, Projection


def heads_of(projection: Projection, dim: int, layer: int) -> Heads:
    """The sizes of the heads that attention sees, told by what the projection makes of no tokens.

    Args:
        projection: any.
        dim: width of the layer's input.
        layer: its index.
    """
    k, v = projection.expand(_nothing(projection))
    return Heads(dim, projection.heads, k.shape[1], k.shape[3], v.shape[3], layer)


def check_stateful(attention: Stateful, projection: Projection) -> None:
    """Refuse a projection whose entries aren't the keys and values that the state is made of.

    Raises:
        InputError: it is such a one.
    """
    # Gates on heads (MoH) come after the one call of the attention, and are told by the new tokens.
    plain = (projection.attends_once or projection.selects) and not (
        projection.rotates_on_read or projection.absorbs("decode")
    )
    if plain:
        nothing = _nothing(projection)
        k, v = projection.expand(nothing)
        plain = any(k is x for x in nothing.values()) and any(v is x for x in nothing.values())
    if not plain:
        raise InputError(
            f"Attention: {type(attention).__name__} keeps a state made of keys and values, but "
            f"{type(projection).__name__} caches other entries or has keys that aren't tokens; "
            'expected plain heads, such as projection="mha", "gqa", "mqa", "mfa", "sqa" or "moh".'
        )


def new_keys(k: Tensor, length: int) -> Tensor:
    """A stand-in of k (B, Hkv, n, D) for the keys of all `length` tokens, which takes no memory."""
    return k if k.shape[2] == length else k.new_empty(1).expand(*k.shape[:2], length, k.shape[3])


@torch.no_grad()
def _nothing(projection: Projection) -> dict[str, Tensor]:
    """Entries of no token; those that reading turns are there as well."""
    weight = next(projection.parameters())
    made = {f.name: weight.new_zeros(1, f.shape[0], 0, f.shape[1]) for f in projection.fields}
    return projection.rotate(
        weight.new_zeros(1, projection.heads, 0, 1), made, _none(weight), lambda x, _: x
    )[1]


def _none(like: Tensor) -> Positions:
    empty = torch.zeros(0, dtype=torch.int64, device=like.device)
    return Positions(empty, empty)
