"""Where documents begin and end among the keys of a call, and their blocks.

Blocks are cut anew in every document, and padding in front of a sequence moves no block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.masks import documents
from foveate.ops.masks.algebra import And
from foveate.ops.masks.base import Mask
from foveate.parts.block_rows import Blocks
from foveate.parts.context import Context
from foveate.parts.form import is_causal_or_full
from foveate.parts.tokens import Tokens


class Documents(NamedTuple):
    """A call's blocks, and the document of each.

    blocks; document (B', C), -1 of no block; own, place (B', Lq): block and place of each query.
    """

    blocks: Blocks
    document: Tensor
    own: Tensor
    place: Tensor


def documents_of(ctx: Context, tokens: Tokens, block: int) -> Documents:
    """Cut the keys.

    Raises:
        InputError: the mask isn't causal attention, whole or within documents, padding aside.
    """
    bounds, rest = _split(ctx.mask)
    if not tokens.causal or not tokens.regular or not _plain(ctx, tokens, bounds, rest):
        raise InputError(
            "moba is defined for causal attention over the whole sequence or over documents, but "
            f"the mask is {ctx.mask!r} (None is everything); give Context(mask=causal()) or "
            "causal() & documents(...), or use block-sparse, which keeps to any mask. Without "
            "causality it is vmoba."
        )
    keys, docs = [], []
    for b, real in enumerate(tokens.k_real):
        at = real.nonzero()[:, 0]
        # An entry of padding alone is cut as if it were real; the mask lets it see nothing.
        at = at if len(at) else torch.arange(len(real), device=real.device)
        where = tokens.k_pos[b if len(tokens.k_pos) > 1 else 0][at]
        number = torch.zeros_like(at)
        if bounds is not None:
            edges = torch.tensor(bounds, device=at.device)
            number = torch.bucketize(where, edges, right=True)
        mine, of = [], []
        for one in number.unique_consecutive().tolist():
            tokens_of_it = at[number == one]
            spare = -len(tokens_of_it) % block
            cut = torch.nn.functional.pad(tokens_of_it, (0, spare), value=-1).view(-1, block)
            mine.append(cut)
            of.append(cut.new_full((len(cut),), one))
        keys.append(torch.cat(mine))
        docs.append(torch.cat(of))
    count = max(len(x) for x in keys)
    # Documents of fewer tokens than a block leave places that no one needs.
    width = min(block, max(int((x >= 0).sum(1).max()) for x in keys))
    table = torch.stack([_longer(x[:, :width], count) for x in keys])
    document = torch.stack([_longer(x, count) for x in docs])
    blocks = Blocks(table)
    block_of, place_of = blocks.owner(tokens.k_real.shape[1])
    at = tokens.shift[:, None] + torch.arange(tokens.q_real.shape[1], device=table.device)
    inside = (at >= 0) & (at < tokens.k_real.shape[1]) & tokens.q_real
    inside = inside & tokens.k_real.any(1, keepdim=True)
    at = at.clamp(0, max(0, tokens.k_real.shape[1] - 1))
    batch = max(len(x) for x in (block_of, at, inside))
    own, place = (x.expand(batch, -1).gather(1, at.expand(batch, -1)) for x in (block_of, place_of))
    return Documents(blocks, document, own.masked_fill(~inside, -1), place)


def _longer(x: Tensor, count: int) -> Tensor:
    spare = (0, count - len(x)) if x.dim() == 1 else (0, 0, 0, count - len(x))
    return torch.nn.functional.pad(x, spare, value=-1)


def _split(mask: Mask | None) -> tuple[tuple[int, ...] | None, list[Mask]]:
    """Boundaries of the documents that a mask names, and its other conjuncts."""
    parts = list(mask.parts) if isinstance(mask, And) else [] if mask is None else [mask]
    found = [part for part in parts if isinstance(part, documents)]
    rest = [part for part in parts if not isinstance(part, documents)]
    return (tuple(found[0].cu_seqlens) if len(found) == 1 else None), rest


def _plain(ctx: Context, tokens: Tokens, bounds: tuple[int, ...] | None, rest: list[Mask]) -> bool:
    if bounds is None:
        return is_causal_or_full(ctx, tokens)
    names = {part.spec.partition("(")[0] for part in rest}
    return names <= {"causal", "padding"} and "causal" in names
