"""Blocks counted from each sequence's first real token, so that padding moves no boundary.

Where the padding in front is no multiple of a block, rows are given places: index i stands at place
i + front, in front of them places without a row, and blocks are cut along places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.ops import Layout
from foveate.ops.layout.build import build
from foveate.parts.attention import EVERYTHING, remember
from foveate.parts.context import Context
from foveate.parts.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Places:
    """The rows of one side of a call, with blocks that begin at the first real one.

    Attributes:
        front: (B',) places without a row before index 0, fewer than a block.
        index: (B', N) index at each place, -1 where there is none.
    """

    front: Tensor
    index: Tensor

    @staticmethod
    def of(real: Tensor, tile: int) -> Places:
        """Places of rows of which `real` (B', L) are tokens, cut into blocks of `tile`."""
        length = real.shape[1]
        first = real.int().argmax(1) if length else real.new_zeros(len(real), dtype=torch.int64)
        front = -first % tile
        most = int(front.max()) if len(front) else 0
        index = torch.arange(length + most, device=real.device) - front[:, None]
        return Places(front, index.masked_fill((index < 0) | (index >= length), -1))

    @property
    def moved(self) -> bool:
        """Whether any block begins elsewhere than at a multiple of its size."""
        return bool(self.front.any())

    def take(self, x: Tensor) -> Tensor:
        """Values x (1 or B', L) by place, (B', N); where there is no row, of the nearest one."""
        last = x.shape[1] - 1
        inside = torch.arange(self.index.shape[1], device=x.device) - self.front[:, None]
        return x.expand(len(self.front), -1).gather(1, inside.clamp(0, last))

    def rows(self) -> Tensor | None:
        """What a layout wants for its `q_index` or `kv_index`: (B', 1, N), None for "as it is"."""
        return self.index[:, None].int() if self.moved else None


def placed(layout: Layout, lengths: tuple[int, int], q: Places, k: Places | None) -> Layout:
    """A layout over places, as one over the (Lq, Lkv) rows that stand there."""
    return replace(
        layout,
        q_len=lengths[0],
        kv_len=lengths[1],
        q_index=q.rows(),
        kv_index=None if k is None else k.rows(),
        _counts=[],
    )


def mask_by_places(ctx: Context, tokens: Tokens, q: Places, k: Places, tile: int) -> Layout:
    """The layout of `ctx.mask` over places, `tile` by `tile`; kept in `ctx.store`."""
    mask = EVERYTHING if ctx.mask is None else ctx.mask
    lengths = (tokens.q_real.shape[1], tokens.k_real.shape[1])

    def make() -> Layout:
        mask._check(*lengths)
        with torch.inference_mode(False):  # what is kept must serve training, too
            return build(mask, q.take(tokens.q_pos), k.take(tokens.k_pos), (tile, tile), None)

    return remember(ctx, (mask_by_places, mask, lengths, tile, q.front.device), make)
