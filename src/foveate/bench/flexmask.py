"""A mask as FlexAttention wants it: lists of blocks, and a function of indices for partial ones.

`Layout.to_block_mask` looks elements up in a table; here the function is written as FlexAttention's
users write it (comparisons, document ids), so that it is measured at its best.
"""

from __future__ import annotations

import operator
from functools import reduce

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from foveate.bench.case import Case, Seen
from foveate.ops import Layout, Mask, blocks, documents, region
from foveate.ops.masks.algebra import And, Not, Or


def block_mask(case: Case, layout: Layout) -> BlockMask:
    """The block mask of a case.

    Where the layout gathers single keys, every block that holds one is visited.
    """
    function = case.seen
    if case.mask is not None:
        function = modifier(case.mask, case.length)
    if layout.gathered is None:
        lists = layout.to_block_mask()
        counts, columns = lists.kv_num_blocks, lists.kv_indices
        full_counts, full_columns = lists.full_kv_num_blocks, lists.full_kv_indices
    else:
        counts, columns, full_counts, full_columns = _scan(case, layout.q_tile, layout.kv_tile)
    return BlockMask.from_kv_blocks(
        counts,
        columns,
        full_counts,
        full_columns,
        BLOCK_SIZE=(layout.q_tile, layout.kv_tile),
        mask_mod=function,
        seq_lengths=(layout.q_len, layout.kv_len),
    )


def _scan(case: Case, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(how many, which) partial blocks and full ones, found element by element."""
    partial, whole = [], []
    for part in torch.arange(case.length).split(rows):
        allowed = case.allowed(part)
        spare = -case.length % cols
        some = pad(allowed, (0, spare)).unflatten(-1, (-1, cols)).any(-1).any(-2)
        every = pad(allowed, (0, spare), value=True).unflatten(-1, (-1, cols)).all(-1).all(-2)
        partial.append(some & ~every)
        whole.append(every)
    return *_lists(torch.stack(partial, 2)), *_lists(torch.stack(whole, 2))


def _lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    counts = chosen.sum(-1).int()
    return counts, torch.argsort(chosen.int(), dim=-1, descending=True, stable=True).int()


def modifier(mask: Mask, length: int) -> Seen:
    """A function (batch, head, query index, key index) -> bool for as many queries as keys."""
    if isinstance(mask, And | Or):
        parts = [modifier(part, length) for part in mask.parts]
        join = operator.and_ if isinstance(mask, And) else operator.or_
        return lambda b, h, q, k: reduce(join, (part(b, h, q, k) for part in parts))
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


def _region(mask: region) -> Seen:
    (q0, q1), (k0, k1) = mask.queries, mask.keys
    inner, shift = mask.inner, (k1 - k0) - (q1 - q0)

    def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (q >= q0) & (q < q1) & (k >= k0) & (k < k1)
        return seen if inner is None else seen & inner._element(q - q0 + shift, k - k0, 0, 0)

    return inside
