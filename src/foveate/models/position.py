"""Learned absolute positions, and the last norm of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foveate.models.config import FoveateConfig
from foveate.models.masking import Seen
from foveate.nn import Block
from foveate.ops.errors import InputError, nearest
from foveate.parts.norm import norm_of

POSITIONS = ("rope", "none", "learned")


def positions_of(config: FoveateConfig) -> nn.Embedding | None:
    """Embeddings of positions, where the config asks for learned ones.

    Raises:
        InputError: an unknown kind of positions.
    """
    if config.position not in POSITIONS:
        raise InputError(
            f"FoveateConfig(position={config.position!r}) is unknown; "
            f"{nearest(str(config.position), POSITIONS)}"
        )
    if config.position != "learned":
        return None
    return nn.Embedding(config.max_position_embeddings, config.hidden_size)


def positioned(
    embed: nn.Embedding | None, x: Tensor, past: int, seen: Seen, position_ids: Tensor | None
) -> Tensor:
    """Give x (B, n, dim) with the embeddings of its tokens' positions, if there are some.

    Positions count from each row's first real token (those of padding don't matter) or from each
    packed sequence's, as position_ids say.

    Raises:
        InputError: there are more positions than embeddings.
    """
    if embed is None:
        return x
    at = seen.q_positions
    if at is None:
        at = position_ids
    if at is None:
        at = torch.arange(past, past + x.shape[1], device=x.device)
    if at.numel() and int(at.max()) >= embed.num_embeddings:
        raise InputError(
            f"position {int(at.max())}: this model has learned {embed.num_embeddings} positions; "
            "build it with a larger max_position_embeddings."
        )
    return x + embed(at.clamp_min(0))


def last_norm(config: FoveateConfig, blocks: Sequence[Block]) -> nn.Module:
    """The norm behind the last block; none behind one that ends with its own."""
    if blocks and blocks[-1].attention_norm is None:
        return nn.Identity()
    return norm_of(config.norm, config.hidden_size, config.rms_norm_eps)
