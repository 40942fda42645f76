"""Which nodes attend to each other: siblings, as layouts of the core op.

Breadth first, a family is one contiguous range of nodes, so that the scores of all families are the
blocks on the diagonal of one (nodes x nodes) matrix. Only tiles that hold some are listed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops import Layout
from foveate.ops.layout import bits as bitset
from foveate.ops.layout.build import Found, assemble
from foveate.ops.layout.core import FULL, KEY_RANGE
from foveate.parts.tree import Tree

_TILES = 1024  # evaluated in one go


def tile_of(tree: Tree) -> int:
    """Rows of a tile: wide enough for most families, no wider."""
    return 64 if tree.widest > 16 else 32


def sibling_layout(tree: Tree, *, own: bool) -> Layout:
    """Node B (but for roots, which come first) sees its siblings; a leaf itself too, if `own`."""
    return tree.kept((sibling_layout, own), lambda: _siblings(tree, own, tile_of(tree)))


def _siblings(tree: Tree, own: bool, tile: int) -> Layout:
    n = len(tree) - tree.trees
    lo, hi = (tree.family[tree.trees :] - tree.trees).unbind(1)
    reflexive = tree.leaf[tree.trees :] & own
    rows, cols, whole = _visited(lo, hi, n, tile)
    # A tile off the diagonal that every row of it sees is full, also one on it of leaves alone.
    spare = -n % tile
    lo, hi = (torch.nn.functional.pad(x, (0, spare), value=0) for x in (lo, hi))
    reflexive = torch.nn.functional.pad(reflexive, (0, spare))
    slots = torch.arange(tile, device=lo.device)
    kinds = torch.full_like(rows, 1, dtype=torch.int32)
    keep = torch.ones_like(whole)
    sure = whole & (rows != cols)
    kinds[sure] = FULL
    packed = [bitset.pack(torch.zeros(0, tile, tile, dtype=torch.bool, device=lo.device))]
    for part in (~sure).nonzero()[:, 0].split(_TILES):
        r = (rows[part] * tile)[:, None, None] + slots  # (m, 1, tile) rows
        c = (cols[part] * tile)[:, None, None] + slots[:, None]  # (m, tile, 1) keys
        seen = (c >= lo[r]) & (c < hi[r]) & ((c != r) | reflexive[r])
        real = (c < n) & (r < n)
        keep[part] = seen.flatten(1).any(1)
        full = (seen | ~real).flatten(1).all(1)
        kinds[part[full]] = FULL
        packed.append(bitset.pack(seen[keep[part] & ~full]))
    keep = keep.bool()
    found = Found(rows[keep], cols[keep], kinds[keep], torch.cat(packed))
    return assemble([found], (1, 1), (n, n), (tile, tile))


def _visited(lo: Tensor, hi: Tensor, n: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, whether every row of it sees all of it) of tiles within ranges of keys.

    Row r sees keys lo[r] ... hi[r] - 1, or none where hi <= lo.
    """
    count = -(-len(lo) // tile)
    most = 1 << 40  # beyond any key, and a float holds it
    spare = count * tile - len(lo)
    some = hi > lo

    def by_tile(x: Tensor, empty: int, behind: int) -> Tensor:
        x = torch.where(some, x, empty)
        return torch.nn.functional.pad(x, (0, spare), value=behind).reshape(count, tile)

    begin = (by_tile(lo, most, most).amin(1).clamp_max(n)) // tile
    visits = (-(-by_tile(hi, 0, 0).amax(1) // tile) - begin).clamp_min(0)
    rows = torch.repeat_interleave(torch.arange(count, device=lo.device), visits)
    cols = torch.arange(len(rows), device=lo.device) - (visits.cumsum(0) - visits)[rows]
    cols = cols + begin[rows]
    least, until = by_tile(lo, most, 0).amax(1)[rows], by_tile(hi, 0, most).amin(1)[rows]
    whole = (cols * tile >= least) & (((cols + 1) * tile).clamp_max(n) <= until)
    return rows, cols, whole


def range_layout(lo: Tensor, hi: Tensor, kv_len: int, tile: int = 64) -> Layout:
    """Row r sees keys lo[r] ... hi[r] - 1, or none where hi <= lo."""
    rows, cols, whole = _visited(lo, hi, kv_len, tile)
    q_tiles = -(-len(lo) // tile)
    ends = torch.bincount(rows, minlength=q_tiles).cumsum(0)
    return Layout(
        q_len=len(lo),
        kv_len=kv_len,
        q_tile=tile,
        kv_tile=tile,
        ptr=torch.cat((ends.new_zeros(1), ends))[None, None],
        cols=cols.int(),
        kinds=torch.where(whole, FULL, KEY_RANGE).int(),
        bits=torch.zeros(0, tile, tile // 8, dtype=torch.uint8, device=lo.device),
        key_range=torch.stack((lo, torch.maximum(lo, hi)), -1).int()[None, None],
    )
