"""To and from FlexAttention's BlockMask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from foveate.ops.errors import InputError
from foveate.ops.layout import bits as bitset
from foveate.ops.layout.build import Found, assemble
from foveate.ops.layout.core import FULL, Layout


def to_block_mask(layout: Layout) -> BlockMask:
    """A BlockMask with the same pairs; see `Layout.to_block_mask`."""
    gathers = {
        "single keys": layout.gathered,
        "query rows": layout.q_index,
        "keys": layout.kv_index,
    }
    for what, table in gathers.items():
        if table is not None:
            raise InputError(
                f"A BlockMask can't gather {what}; run this layout on another backend, or build it "
                "from a mask."
            )
    if not layout.q_len or not layout.kv_len:
        raise InputError("A BlockMask needs at least one query and one key.")
    batches, heads = layout.groups
    shape = (batches * heads * layout.q_tiles, layout.kv_tiles)
    entry = torch.full(shape, -1, device=layout.device)
    entry[layout.entry_rows, layout.cols.long()] = torch.arange(
        layout.cols.numel(), device=layout.device
    )
    entry = entry.reshape(batches, heads, layout.q_tiles, layout.kv_tiles)
    whole = (layout.kinds == FULL)[entry.clamp_min(0)] & (entry >= 0)
    seen, tile = _element_table(layout, entry)
    rows, cols = layout.q_tile, layout.kv_tile

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        one = tile[b * (batches > 1), h * (heads > 1), q // rows, k // cols]
        return seen[one, q % rows, k % cols]

    partial = (entry >= 0) & ~whole
    return BlockMask.from_kv_blocks(
        *_lists(partial),
        *_lists(whole),
        BLOCK_SIZE=(rows, cols),
        mask_mod=allowed,
        seq_lengths=(layout.q_len, layout.kv_len),
    )


def _element_table(layout: Layout, entry: Tensor) -> tuple[Tensor, Tensor]:
    """(distinct tiles as bool (n, q_tile, kv_tile), which of them each tile is).

    Tile 0 is empty and tile 1 full.
    """
    every = torch.arange(layout.cols.numel(), device=layout.device)
    special = layout.kinds < FULL
    if bool(special.any()):
        packed = torch.cat([bitset.pack(layout.entry_mask(p).mT) for p in every.split(1024)])
        table, index = bitset.distinct(packed)
        of_entry = index + 2
        of_entry[layout.kinds == FULL] = 1
    else:
        table, of_entry = layout.bits, layout.kinds.long() + 1
    tiles = bitset.unpack(table, layout.q_tile)
    ends = torch.stack((torch.zeros(tiles.shape[1:]), torch.ones(tiles.shape[1:]))).bool()
    which = of_entry[entry.clamp_min(0)].masked_fill(entry < 0, 0)
    return torch.cat((ends.to(tiles.device), tiles)), which


def _lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(how many, which first) of the chosen columns, as BlockMask wants them."""
    counts = chosen.sum(-1).int()
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True).int()
    return counts, order


def from_block_mask(block_mask: BlockMask) -> Layout:
    """A Layout with the same pairs; see `Layout.from_block_mask`."""
    q_len, kv_len = block_mask.seq_lengths
    rows, cols = block_mask.BLOCK_SIZE
    if rows % 8 or cols % 8:
        raise InputError(f"from_block_mask: block sizes {rows} x {cols} must be multiples of 8.")
    partial = _table(block_mask.kv_num_blocks, block_mask.kv_indices)
    whole = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        whole = _table(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    batches, heads = partial.shape[:2]
    found = []
    for b in range(batches):
        for h in range(heads):
            found.append(_group(block_mask, b, h, partial[b, h], whole[b, h]))
    return assemble(found, (batches, heads), (q_len, kv_len), (rows, cols))


def _table(counts: Tensor, indices: Tensor) -> Tensor:
    """Lists of blocks as a boolean table (B, H, Tq, Tk)."""
    slots = torch.arange(indices.shape[-1], device=indices.device)
    listed = slots < counts[..., None]
    table = torch.zeros(indices.shape, dtype=torch.int32, device=indices.device)
    return table.scatter_add(-1, indices.long(), listed.int()) > 0


def _group(mask: BlockMask, b: int, h: int, partial: Tensor, whole: Tensor) -> Found:
    (q_len, kv_len), (rows, cols) = mask.seq_lengths, mask.BLOCK_SIZE
    r, c = (partial | whole).nonzero(as_tuple=True)
    kinds = (~whole[r, c]).int()
    at = torch.tensor([b, h], device=r.device)
    packed = [torch.zeros((0, cols, rows // 8), dtype=torch.uint8, device=r.device)]
    for part in kinds.nonzero()[:, 0].split(256):
        q = r[part, None, None] * rows + torch.arange(rows, device=r.device)[None, None, :]
        k = c[part, None, None] * cols + torch.arange(cols, device=r.device)[None, :, None]
        inside = (q < q_len) & (k < kv_len)
        q, k = q.clamp_max(q_len - 1), k.clamp_max(kv_len - 1)
        seen = mask.mask_mod(at[0], at[1], q, k)
        packed.append(bitset.pack((seen & inside).expand(inside.shape)))
    return Found(r, c, kinds, torch.cat(packed))
