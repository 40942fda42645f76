"""A layout: a mask or a selection resolved for given lengths, as a list of tiles to visit.

Queries are cut into tiles of `q_tile` rows, keys into tiles of `kv_tile`; a compressed-row list
says which key tiles each query tile visits, and each entry's kind which elements of it count:

    kind  0 (FULL)       every element
    kind  i > 0          those set in bit tile i - 1 (each distinct pattern is stored once)
    kind -1 (KEY_RANGE)  row r sees virtual keys key_range[r, 0] ... key_range[r, 1] - 1
    kind -2 (ROW_RANGE)  virtual rows row_range[c, 0] ... row_range[c, 1] - 1 see virtual key c

Columns past the last key tile name *gathered* tiles: lists of single keys. `q_index`, `kv_index`
put any order, or a choice, of rows before the tiles; a query may stand in several tiles, and its
parts are then merged by their lse. Where the pattern is the same for all heads or batch entries the
group axes Bm, Hm have size 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.layout import bits as bitset
from foveate.ops.layout.sound import check_lists

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from foveate.ops.masks.base import Mask

FULL = 0
KEY_RANGE = -1
ROW_RANGE = -2


class Transposed(NamedTuple):
    """The same entries listed by key tile, as the backward of keys and values wants them."""

    ptr: Tensor  # (Bm, Hm, Tk + M + 1) int64, gathered tiles after the Tk ordinary ones
    rows: Tensor  # (nnz,) int32 query tile
    entries: Tensor  # (nnz,) int64 position in `cols` and `kinds`


@dataclass(frozen=True, eq=False)
class Layout:
    """Which tiles to visit; see the module's text.

    Shapes: ptr (Bm, Hm, Tq + 1) int64 · cols, kinds (nnz,) int32 · bits (n, kv_tile, q_tile / 8)
    uint8, bit r % 8 of byte r // 8 is query row r · gathered (m, kv_tile) int32, -1 is no key ·
    q_index (Bm or 1, Hm or 1, Nq) int32, -1 is no query · kv_index likewise · key_range
    (Bm or 1, Hm or 1, Nq, 2), row_range (Bm or 1, Hm or 1, Nk, 2) int32.
    """

    q_len: int
    kv_len: int
    q_tile: int
    kv_tile: int
    ptr: Tensor
    cols: Tensor
    kinds: Tensor
    bits: Tensor
    gathered: Tensor | None = None
    q_index: Tensor | None = None
    kv_index: Tensor | None = None
    key_range: Tensor | None = None
    row_range: Tensor | None = None
    _counts: list[Tensor] = field(default_factory=list, repr=False)

    # -- sizes -----------------------------------------------------------------------------------
    @property
    def groups(self) -> tuple[int, int]:
        """(batch entries, heads) that have a list of their own."""
        return (self.ptr.shape[0], self.ptr.shape[1])

    @property
    def q_rows(self) -> int:
        """Virtual query rows: those of `q_index`, or the queries themselves."""
        return self.q_len if self.q_index is None else self.q_index.shape[-1]

    @property
    def kv_rows(self) -> int:
        """Virtual keys: those of `kv_index`, or the keys themselves."""
        return self.kv_len if self.kv_index is None else self.kv_index.shape[-1]

    @property
    def q_tiles(self) -> int:
        """Number of query tiles, Tq."""
        return self.ptr.shape[2] - 1

    @property
    def kv_tiles(self) -> int:
        """Number of ordinary key tiles, Tk."""
        return -(-self.kv_rows // self.kv_tile)

    @property
    def device(self) -> torch.device:
        """Where the lists live."""
        return self.ptr.device

    def to(self, device: torch.device | str) -> Layout:
        """The same layout with its lists on another device."""
        moved: dict[str, Any] = {
            f.name: (v.to(device) if isinstance(v := getattr(self, f.name), Tensor) else v)
            for f in fields(self)
            if f.name != "_counts"
        }
        return Layout(**moved)

    # -- elements --------------------------------------------------------------------------------
    @cached_property
    def entry_rows(self) -> Tensor:
        """(nnz,) int64: for each entry its row in the flattened (Bm * Hm * Tq) list of tiles."""
        counts = (self.ptr[..., 1:] - self.ptr[..., :-1]).reshape(-1)
        rows = torch.arange(counts.numel(), device=self.device)
        return torch.repeat_interleave(rows, counts, output_size=self.cols.numel())

    def entry_keys(self, entries: Tensor) -> Tensor:
        """(n, kv_tile) int64 indices of real keys for the given entries; -1 is no key."""
        virtual = self._virtual_keys(entries)
        return virtual if self.kv_index is None else self._look_up(self.kv_index, virtual, entries)

    def _virtual_keys(self, entries: Tensor) -> Tensor:
        cols = self.cols[entries].long()
        slots = torch.arange(self.kv_tile, device=self.device)
        virtual = cols[:, None] * self.kv_tile + slots
        if self.gathered is not None:
            single = cols >= self.kv_tiles
            listed = self.gathered[(cols - self.kv_tiles).clamp_min(0)].long()
            virtual = torch.where(single[:, None], listed, virtual)
        return virtual.masked_fill(virtual >= self.kv_rows, -1)

    def entry_queries(self, entries: Tensor) -> Tensor:
        """(n, q_tile) int64 indices of real queries for the given entries; -1 is no query."""
        tile = self.entry_rows[entries] % self.q_tiles
        virtual = tile[:, None] * self.q_tile + torch.arange(self.q_tile, device=self.device)
        virtual = virtual.masked_fill(virtual >= self.q_rows, -1)
        if self.q_index is None:
            return virtual
        return self._look_up(self.q_index, virtual, entries)

    def entry_mask(self, entries: Tensor) -> Tensor:
        """(n, q_tile, kv_tile) bool: which elements of the given entries attend."""
        kinds = self.kinds[entries]
        seen = torch.ones(
            len(entries), self.q_tile, self.kv_tile, dtype=torch.bool, device=self.device
        )
        partial = (kinds > 0).nonzero()[:, 0]
        if partial.numel():
            seen[partial] = bitset.unpack(self.bits[kinds[partial].long() - 1], self.q_tile)
        if self.key_range is not None or self.row_range is not None:
            seen &= self._in_ranges(entries, kinds)
        seen &= (self.entry_queries(entries) >= 0)[:, :, None]
        return seen & (self.entry_keys(entries) >= 0)[:, None, :]

    def _in_ranges(self, entries: Tensor, kinds: Tensor) -> Tensor:
        tile = self.entry_rows[entries] % self.q_tiles
        rows = tile[:, None] * self.q_tile + torch.arange(self.q_tile, device=self.device)
        cols = self._virtual_keys(entries)
        inside = torch.ones(
            len(entries), self.q_tile, self.kv_tile, dtype=torch.bool, device=self.device
        )
        for kind, table, at, other in (
            (KEY_RANGE, self.key_range, rows, cols[:, None, :]),
            (ROW_RANGE, self.row_range, cols, rows[:, :, None]),
        ):
            if table is None:
                continue
            lo = self._look_up(table[..., 0], at.clamp_max(table.shape[2] - 1), entries)
            hi = self._look_up(table[..., 1], at.clamp_max(table.shape[2] - 1), entries)
            axis = 2 if kind == KEY_RANGE else 1
            within = (other >= lo.unsqueeze(axis)) & (other < hi.unsqueeze(axis))
            inside &= within | (kinds != kind)[:, None, None]
        return inside

    def _look_up(self, table: Tensor, at: Tensor, entries: Tensor) -> Tensor:
        """Table (Bm or 1, Hm or 1, N) read at `at` (n, m) in each entry's group; -1 stays -1."""
        batches, heads = self.groups
        group = self.entry_rows[entries] // self.q_tiles
        b = (group // heads) if table.shape[0] > 1 else torch.zeros_like(group)
        h = (group % heads) if table.shape[1] > 1 else torch.zeros_like(group)
        found = table[b[:, None], h[:, None], at.clamp_min(0)].long()
        return found.masked_fill(at < 0, -1)

    def dense(self) -> Tensor:
        """The layout element by element: bool (Bm, Hm, q_len, kv_len). For tests and pictures."""
        batches, heads = self.groups
        out = torch.zeros(batches * heads, self.q_len + 1, self.kv_len + 1, dtype=torch.bool)
        out = out.to(self.device)
        for part in torch.arange(self.cols.numel(), device=self.device).split(1024):
            group = (self.entry_rows[part] // self.q_tiles)[:, None, None]
            rows, cols = self.entry_queries(part)[:, :, None], self.entry_keys(part)[:, None, :]
            seen = self.entry_mask(part)
            where = seen.nonzero(as_tuple=True)
            out[
                group.expand_as(seen)[where],
                rows.expand_as(seen)[where],
                cols.expand_as(seen)[where],
            ] = True
        return out[:, : self.q_len, : self.kv_len].reshape(batches, heads, self.q_len, self.kv_len)

    @cached_property
    def transposed(self) -> Transposed:
        """The entries listed by key tile; within one, query tiles rise."""
        batches, heads = self.groups
        extra = 0 if self.gathered is None else self.gathered.shape[0]
        width = self.kv_tiles + extra
        group = self.entry_rows // max(1, self.q_tiles)
        order = torch.argsort(group * width + self.cols.long(), stable=True)
        counts = torch.bincount(group * width + self.cols.long(), minlength=batches * heads * width)
        ends = counts.cumsum(0).reshape(batches, heads, width)
        starts = (ends.reshape(-1) - counts).reshape(batches, heads, width)[..., :1]
        rows = (self.entry_rows % max(1, self.q_tiles))[order].int()
        return Transposed(torch.cat((starts, ends), -1), rows, order)

    @cached_property
    def sound(self) -> bool:
        """True; raises InputError if the lists contradict each other. Looked at once."""
        check_lists(self)
        return True

    def checked(self) -> Layout:
        """This layout, its lists looked at: kernels follow them without looking.

        Raises:
            InputError: the lists contradict each other.
        """
        _ = self.sound
        return self

    # -- counts ----------------------------------------------------------------------------------
    def _count(self) -> Tensor:
        """(2, Bm, Hm) int64: exact pairs, and elements of visited tiles."""
        if not self._counts:
            batches, heads = self.groups
            every = torch.arange(self.cols.numel(), device=self.device)
            group = self.entry_rows // max(1, self.q_tiles)
            pairs = torch.zeros(batches * heads, dtype=torch.int64, device=self.device)
            area = torch.zeros_like(pairs)
            edges_only = self.key_range is None and self.row_range is None
            fast = torch.zeros_like(every, dtype=torch.bool)
            if edges_only and self.q_index is None and self.kv_index is None:
                inner_row = (self.entry_rows % max(1, self.q_tiles) + 1) * self.q_tile <= self.q_len
                whole = (torch.arange(self.kv_tiles, device=self.device) + 1) * self.kv_tile
                whole = whole <= self.kv_len
                if self.gathered is not None:
                    whole = torch.cat((whole, (self.gathered >= 0).all(1)))
                fast = inner_row & whole[self.cols.long()]
                size = self.q_tile * self.kv_tile
                table = torch.cat((pairs.new_tensor([size]), bitset.count(self.bits)))
                pairs.index_add_(0, group[fast], table[self.kinds[fast].long()])
                area.index_add_(0, group[fast], torch.full_like(group[fast], size))
            for part in every[~fast].split(max(1, 2**24 // (self.q_tile * self.kv_tile))):
                pairs.index_add_(0, group[part], self.entry_mask(part).sum((1, 2)))
                real = (self.entry_queries(part) >= 0).sum(1) * (self.entry_keys(part) >= 0).sum(1)
                area.index_add_(0, group[part], real)
            self._counts.append(torch.stack((pairs, area)).reshape(2, batches, heads))
        return self._counts[0]

    def pairs_by_group(self) -> Tensor:
        """(Bm, Hm) int64: (query, key) pairs that attend, exactly."""
        return self._count()[0]

    @property
    def pairs(self) -> float:
        """(query, key) pairs that attend, mean over batch entries and heads."""
        return float(self._count()[0].double().mean())

    @property
    def tile_area(self) -> float:
        """Elements of all visited tiles, clipped to the lengths, mean over batch and heads."""
        return float(self._count()[1].double().mean())

    @property
    def density(self) -> float:
        """Share of all q_len * kv_len pairs that attend."""
        return self.pairs / max(1, self.q_len * self.kv_len)

    @property
    def tile_density(self) -> float:
        """Share of all q_len * kv_len elements that lie in visited tiles."""
        return self.tile_area / max(1, self.q_len * self.kv_len)

    def flops(self, batch: int, heads: int, head_dim: int, value_dim: int | None = None) -> float:
        """Useful floating-point operations of the forward: 2 (D + Dv) for each pair."""
        return 2.0 * batch * heads * self.pairs * (head_dim + (value_dim or head_dim))

    def bytes(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        itemsize: int = 2,
    ) -> float:
        """Bytes of keys and values read if each query tile reads its visited tiles once."""
        width = head_dim + (value_dim or head_dim)
        return self.tile_area / self.q_tile * width * itemsize * batch * kv_heads

    # -- ways in and out (their own files; named here so that they are found) --------------------
    @staticmethod
    def from_dense(allowed: Tensor, tile: int | tuple[int, int] = 64) -> Layout:
        """From a boolean mask (Lq, Lkv), (H, Lq, Lkv) or (B, H, Lq, Lkv), True = attend."""
        from foveate.ops.layout import convert

        return convert.from_dense(allowed, tile)

    @staticmethod
    def from_tiles(
        tiles: Tensor,
        q_len: int,
        kv_len: int,
        tile: int | tuple[int, int],
        within: Mask | None = None,
        **positions: Tensor,
    ) -> Layout:
        """From chosen tiles, bool (Bm, Hm, Tq, Tk), their elements limited by the mask `within`.

        With `q_index` (B or 1, 1, Nq), query tiles are of those rows; `positions` are the queries'.
        """
        from foveate.ops.layout import select

        return select.from_tiles(tiles, q_len, kv_len, tile, within, **positions)

    @staticmethod
    def from_selection(
        tiles: Tensor,
        keys: Tensor,
        q_len: int,
        kv_len: int,
        tile: int | tuple[int, int],
        within: Mask | None = None,
        **positions: Tensor,
    ) -> Layout:
        """From chosen tiles, bool (Bm, Hm, Tq, Tk), and single keys, bool (Bm, Hm, Tq, Lkv).

        Keys that lie in a chosen tile of the same query tile are not listed twice. `q_index` as in
        `from_tiles`.
        """
        from foveate.ops.layout import select

        return select.from_selection(tiles, keys, q_len, kv_len, tile, within, **positions)

    @staticmethod
    def from_slices(
        slices: list[tuple[tuple[int, int], tuple[int, int], str]],
        q_len: int,
        kv_len: int,
        tile: int | tuple[int, int] = 64,
    ) -> Layout:
        """From slices (query range, key range, type): full, causal, inv_causal or bi_causal."""
        from foveate.ops.layout import convert

        return convert.from_slices(slices, q_len, kv_len, tile)

    @staticmethod
    def from_column_intervals(
        lts: Tensor,
        lte: Tensor,
        uts: Tensor,
        ute: Tensor,
        q_len: int,
        tile: int | tuple[int, int] = 64,
    ) -> Layout:
        """From FlashMask's column intervals, each (Lkv,) or (B, H, Lkv): rows that are *hidden*."""
        from foveate.ops.layout import convert

        return convert.from_column_intervals(lts, lte, uts, ute, q_len, tile)

    @staticmethod
    def from_block_mask(block_mask: BlockMask) -> Layout:
        """From FlexAttention's BlockMask, its mask_mod evaluated on the partial blocks."""
        from foveate.ops.layout import flex

        return flex.from_block_mask(block_mask)

    def to_block_mask(self) -> BlockMask:
        """As FlexAttention's BlockMask; refuses layouts with gathered rows or keys."""
        from foveate.ops.layout import flex

        return flex.to_block_mask(self)

    def picture(self, size: int = 64, group: tuple[int, int] = (0, 0)) -> Tensor:
        """Shares of visited pairs on a grid of about size x size: float (rows, cols), 0 to 1."""
        from foveate.ops.layout import convert

        return convert.picture(self, size, group)

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        """Refuse a call that this layout was not made for."""
        if (q_len, kv_len) != (self.q_len, self.kv_len):
            raise InputError(
                f"The layout is for {self.q_len} queries and {self.kv_len} keys, but the call has "
                f"{q_len} and {kv_len}; make it for these lengths."
            )
        batches, groups = self.groups
        if batches not in (1, batch):
            raise InputError(f"The layout is for a batch of {batches}, but the call has {batch}.")
        if heads % groups:
            raise InputError(
                f"The layout has {groups} head groups, which don't divide {heads} query heads."
            )
