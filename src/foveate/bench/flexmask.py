"""A mask as FlexAttention wants it: lists of blocks, and a function of indices for partial ones.

`Layout.to_block_mask` looks elements up in a table; here the function is written as FlexAttention's
users write it (comparisons, document ids), so that it is measured at its best.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from foveate.bench.case import Case, Declined
from foveate.ops import Layout, Mask, blocks, documents, region
from foveate.ops.errors import InputError
from foveate.ops.masks.algebra import And, Not, Or

Modifier = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def block_mask(case: Case, layout: Layout) -> BlockMask:
    """The block mask of a case.

    Raises:
        Declined: its layout gathers single keys, which a BlockMask can't.
    """
    try:
        lists = layout.to_block_mask()
    except InputError as error:
        raise Declined(str(error)) from None
    if case.mask is None:
        return lists
    return BlockMask.from_kv_blocks(
        lists.kv_num_blocks,
        lists.kv_indices,
        lists.full_kv_num_blocks,
        lists.full_kv_indices,
        BLOCK_SIZE=lists.BLOCK_SIZE,
        mask_mod=modifier(case.mask, case.length),
        seq_lengths=lists.seq_lengths,
    )


def modifier(mask: Mask, length: int) -> Modifier:
    """A function (batch, head, query index, key index) -> bool for as many queries as keys."""
    if isinstance(mask, And | Or):
        left, right = modifier(mask.left, length), modifier(mask.right, length)
        if isinstance(mask, And):
            return lambda b, h, q, k: left(b, h, q, k) & right(b, h, q, k)
        return lambda b, h, q, k: left(b, h, q, k) | right(b, h, q, k)
    if isinstance(mask, Not):
        inner = modifier(mask.inner, length)
        return lambda b, h, q, k: ~inner(b, h, q, k)
    if isinstance(mask, documents):
        of = torch.bucketize(torch.arange(length), torch.tensor(mask.cu_seqlens), right=True)
        return lambda b, h, q, k: of[q] == of[k]
    if isinstance(mask, blocks):
        table, (rows, cols) = mask.table[0], mask.tile
        if table.shape[0] > 1:
            return lambda b, h, q, k: table[h, q // rows, k // cols]
        return lambda b, h, q, k: table[0, q // rows, k // cols]
    if isinstance(mask, region):
        return _region(mask)
    return lambda b, h, q, k: mask._element(q, k, 0, 0)


def _region(mask: region) -> Modifier:
    (q0, q1), (k0, k1) = mask.queries, mask.keys
    inner, shift = mask.inner, (k1 - k0) - (q1 - q0)

    def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (q >= q0) & (q < q1) & (k >= k0) & (k < k1)
        return seen if inner is None else seen & inner._element(q - q0 + shift, k - k0, 0, 0)

    return inside
