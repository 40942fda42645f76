"""Layouts from other people's descriptions of a mask, and a picture of a layout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from foveate.ops.errors import InputError
from foveate.ops.layout import bits as bitset
from foveate.ops.layout.build import Found, assemble, tile_sizes
from foveate.ops.layout.core import Layout
from foveate.ops.masks.base import Mask
from foveate.ops.masks.relative import causal, window
from foveate.ops.masks.table import region


def from_dense(allowed: Tensor, tile: int | tuple[int, int]) -> Layout:
    """A boolean mask cut into tiles; see `Layout.from_dense`."""
    sizes = tile_sizes(tile)
    if allowed.dtype != torch.bool or allowed.dim() not in (2, 3, 4):
        raise InputError(
            "from_dense: expected bool (Lq, Lkv), (H, Lq, Lkv) or (B, H, Lq, Lkv), True = attend; "
            f"got {allowed.dtype} of shape {tuple(allowed.shape)}."
        )
    allowed = allowed[(None,) * (4 - allowed.dim())]
    batches, heads, q_len, kv_len = allowed.shape
    found = [_cut(plane, sizes) for plane in allowed.flatten(0, 1)]
    return assemble(found, (batches, heads), (q_len, kv_len), sizes)


def _cut(plane: Tensor, tile: tuple[int, int]) -> Found:
    """One boolean matrix as entries; what lies past its border counts as neither."""
    rows, cols = -(-plane.shape[0] // tile[0]), -(-plane.shape[1] // tile[1])
    spare = (0, cols * tile[1] - plane.shape[1], 0, rows * tile[0] - plane.shape[0])
    cut = pad(plane, spare).reshape(rows, tile[0], cols, tile[1]).transpose(1, 2)
    real = pad(torch.ones_like(plane), spare).reshape(rows, tile[0], cols, tile[1]).transpose(1, 2)
    r, c = cut.flatten(2).any(-1).nonzero(as_tuple=True)
    partial = ~(cut | ~real).flatten(2).all(-1)[r, c]
    tiles = cut[r[partial], c[partial]].mT
    return Found(r, c, partial.int(), bitset.pack(tiles))


def from_slices(
    slices: list[tuple[tuple[int, int], tuple[int, int], str]],
    q_len: int,
    kv_len: int,
    tile: int | tuple[int, int],
) -> Layout:
    """Rectangles with a shape of their own inside; see `Layout.from_slices`.

    FULL; CAUSAL is aligned to the lower right corner, INV_CAUSAL to the upper left, BI_CAUSAL is
    both. Query ranges count from the first query. Slices must not overlap.
    """
    whole: Mask | None = None
    area = 0
    for queries, keys, kind in slices:
        inner = _slice(queries, keys, kind)
        one = region(inner, _shift(queries, kv_len - q_len), keys)
        area += one.pairs(q_len, kv_len)
        whole = one if whole is None else whole | one
    if whole is None:
        raise InputError("from_slices: expected at least one slice.")
    layout = whole.layout(q_len, kv_len, tile)
    if int(layout.pairs) != area:
        raise InputError(
            f"from_slices: the slices overlap ({area} pairs in all, {int(layout.pairs)} distinct)."
        )
    return layout


def _shift(span: tuple[int, int], by: int) -> tuple[int, int]:
    return span[0] + by, span[1] + by


def _slice(queries: tuple[int, int], keys: tuple[int, int], kind: str) -> Mask | None:
    extra = (keys[1] - keys[0]) - (queries[1] - queries[0])
    # `region` aligns queries to the end of the keys; from the upper left, i sees j >= i - extra.
    upper_left = window(extra, -1) if extra >= 0 else ~causal() & window(-1, -1)
    if kind == "inv_causal" or kind == "bi_causal":
        if extra < 0:
            raise InputError(
                f"from_slices: {kind} needs at least as many keys as queries, "
                f"got {keys} for {queries}."
            )
        return upper_left if kind == "inv_causal" else upper_left & causal()
    if kind == "causal":
        return causal()
    if kind == "full":
        return None
    raise InputError(
        f"from_slices: type {kind!r}; expected 'full', 'causal', 'inv_causal' or 'bi_causal'."
    )


class _Columns(Mask):
    """FlashMask: key j is hidden from rows [lts, lte) and [uts, ute)."""

    __slots__ = ("hidden", "offset")

    def __init__(self, hidden: Tensor, offset: int) -> None:
        super().__init__("column_intervals($0$)", (hidden,))
        self.hidden = hidden  # (4, B, H, Lkv)
        self.offset = offset

    @override
    def groups(self) -> tuple[int, int]:
        return (self.hidden.shape[1], self.hidden.shape[2])

    def _element(self, q: Tensor, k: Tensor, b: int, h: int) -> Tensor:
        at = k.clamp(0, self.hidden.shape[-1] - 1)
        lts, lte, uts, ute = (x[at] for x in self.hidden[:, b, h])
        row = q - self.offset
        return ~(((row >= lts) & (row < lte)) | ((row >= uts) & (row < ute)))

    def _tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, b: int, h: int):  # type: ignore[no-untyped-def]
        from foveate.ops.masks.base import Certainty

        none = full = None
        for start, end in ((0, 1), (2, 3)):
            s, e = self.hidden[start, b, h], self.hidden[end, b, h]
            last = len(s) - 1
            size = int((k_hi - k_lo).max()) + 1
            span = (k_lo.reshape(-1, 1) + torch.arange(size, device=s.device)).clamp(0, last)
            span = span.minimum(k_hi.reshape(-1, 1).clamp_max(last))
            s_min, s_max = s[span].amin(1)[None], s[span].amax(1)[None]
            e_min, e_max = e[span].amin(1)[None], e[span].amax(1)[None]
            row_lo, row_hi = q_lo - self.offset, q_hi - self.offset
            gone = (row_lo >= s_max) & (row_hi < e_min)
            free = (row_lo >= e_max) | (row_hi < s_min)
            none = gone if none is None else none | gone
            full = free if full is None else full & free
        assert none is not None
        assert full is not None
        return Certainty(none, full)


def from_column_intervals(
    lts: Tensor, lte: Tensor, uts: Tensor, ute: Tensor, q_len: int, tile: int | tuple[int, int]
) -> Layout:
    """FlashMask's column intervals; see `Layout.from_column_intervals`. Rows count from 0."""
    hidden = torch.stack([x.long()[(None,) * (3 - x.dim())] for x in (lts, lte, uts, ute)])
    kv_len = hidden.shape[-1]
    return _Columns(hidden, kv_len - q_len).layout(q_len, kv_len, tile)


def picture(layout: Layout, size: int, group: tuple[int, int]) -> Tensor:
    """Share of pairs that attend on a coarse grid, for one batch entry and head group.

    Exact: each partial tile's elements are counted in the cells that they fall in.
    """
    cell_q, cell_k = (max(1, -(-n // size)) for n in (layout.q_len, layout.kv_len))
    rows, cols = -(-layout.q_len // cell_q), -(-layout.kv_len // cell_k)
    flat = group[0] * layout.groups[1] + group[1]
    counts = torch.zeros(rows + 1, cols + 1, device=layout.device)
    mine = (layout.entry_rows // max(1, layout.q_tiles) == flat).nonzero()[:, 0]
    for part in mine.split(512):
        queries, keys = layout.entry_queries(part), layout.entry_keys(part)
        at_q = torch.where(queries < 0, rows, queries // cell_q)
        at_k = torch.where(keys < 0, cols, keys // cell_k)
        cells = at_q[:, :, None] * (cols + 1) + at_k[:, None, :]
        counts.view(-1).index_add_(
            0, cells.reshape(-1), layout.entry_mask(part).float().reshape(-1)
        )
    full_q = (layout.q_len - torch.arange(rows, device=layout.device) * cell_q).clamp_max(cell_q)
    full_k = (layout.kv_len - torch.arange(cols, device=layout.device) * cell_k).clamp_max(cell_k)
    return counts[:rows, :cols] / (full_q[:, None] * full_k[None])
