"""What the kernels want of a layout beside its lists: made once for each layout, and kept with it.

Lists with their whole tiles first, so that these run without a mask; head by head, the tiles in
order of the work they hold, longest first, so that uneven lists fill the chip; bit tiles as words
along either side, or as ranges where they say no more; and where each query or key stands, if
several tiles hold it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from foveate.ops.layout import FULL, KEY_RANGE, ROW_RANGE, Layout
from foveate.ops.layout import bits as bitset
from foveate.ops.triton.fine import finer
from foveate.ops.triton.intervals import intervals

_GIANT = 2  # times the mean work of a list

_plans: WeakKeyDictionary[Layout, Plan] = WeakKeyDictionary()


def plan_of(layout: Layout) -> Plan:
    """The plan of a layout, made when it is first asked for."""
    found = _plans.get(layout)
    if found is None:
        found = _plans[layout] = Plan(
            **{f.name: getattr(layout, f.name) for f in fields(Layout) if f.name[0] != "_"}
        )
    return found


@dataclass(frozen=True)
class Lists:
    """What each tile of one side visits on the other.

    tiles, kinds: (nnz,) int32, by tile of the owned side, whole ones first. start, mid, end: (n,)
    int64, where the list of a tile begins, its whole tiles end, and all of it ends; a tile counts
    through (Bm, Hm, tiles). work: (Bm, Hm, tiles) int64, a measure of what it costs.
    """

    tiles: Tensor
    kinds: Tensor
    start: Tensor
    mid: Tensor
    end: Tensor
    work: Tensor


class Order(NamedTuple):
    """The order in which lists are worked on.

    lists: (n,) int32, tiles through (Bm, Hm, tiles). giants: how many of the first are so long that
    all heads begin with them, since whatever began with one last would end with it alone.
    """

    lists: Tensor
    giants: int


@dataclass(frozen=True)
class Repeats:
    """Where each of a table's indices stands in it.

    unique: nothing stands twice. at: (Bi, Hi, length, copies) int32, -1 where there is no further
    copy.
    """

    unique: bool
    at: Tensor


@dataclass(frozen=True)
class Slots:
    """The slots that hold each key: slots[begin[g, key] : begin[g, key + 1]], flattened."""

    begin: Tensor
    slots: Tensor


class Plan(Layout):
    """A layout with all that is derived from it for the kernels."""

    @cached_property
    def by_row(self) -> Lists:
        """The key tiles of each query tile.

        In decoding lists are new at each step, and stay as they are: each is one tile's, all of it
        taken with its mask, which costs nothing where memory is what is waited for.
        """
        if self.q_tiles == 1:
            start, end = (self.ptr[..., i].reshape(-1).contiguous() for i in (0, 1))
            return Lists(self.cols, self.kinds, start, start, end, end - start)
        whole = (self.kinds == FULL) & (self.cols < self.kv_rows // self.kv_tile)
        if self.kv_index is not None:
            whole = torch.zeros_like(whole)
        counts = (self.ptr[..., 1:] - self.ptr[..., :-1]).reshape(-1)
        start = self.ptr[..., :-1].reshape(-1).contiguous()
        order = torch.argsort(self.entry_rows * 2 + (~whole).long(), stable=True)
        inside = torch.bincount(self.entry_rows[whole], minlength=counts.numel())
        return _lists(self.cols, self.kinds, order, start, inside, counts, self.groups)

    @cached_property
    def row_order(self) -> Order | None:
        """Query tiles as `_local` has them; None leaves them as is."""
        return None if self.q_tiles == 1 else _local(self.by_row.work)

    @cached_property
    def ordered_bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Start, mid and end of `by_row` as `row_order` has them: read without waiting for it."""
        lists, order = self.by_row, self.row_order
        if order is None:
            return lists.start, lists.mid, lists.end
        return lists.start[order.lists], lists.mid[order.lists], lists.end[order.lists]

    @cached_property
    def key_ranges(self) -> Tensor | None:
        """What each row sees as one range of keys, as `key_range` has it; None if bits say more.

        In decoding lists are new at each step, and their bits stay.
        """
        if self.q_tiles == 1 or not self._only_bits or self.kv_index is not None:
            return None
        found = intervals(
            self.bits, self.q_tile, False, self.entry_rows, self.cols, self.kinds,
            self.ptr.shape[0] * self.ptr.shape[1] * self.q_tiles, self.q_rows,
        )  # fmt: skip
        return None if found is None else found.reshape(*self.groups, -1, 2)

    @cached_property
    def row_ranges(self) -> Tensor | None:
        """What each key is seen by as one range of rows, as `row_range` has it, or None."""
        if not self._only_bits or self.q_index is not None:
            return None
        flipped = self.transposed
        counts = flipped.ptr.diff(dim=-1).reshape(-1)
        owner = torch.repeat_interleave(
            torch.arange(counts.numel(), device=self.device), counts,
            output_size=flipped.rows.numel(),
        )  # fmt: skip
        found = intervals(
            self.bits, self.q_tile, True, owner, flipped.rows, self.kinds[flipped.entries],
            counts.numel(), self.kv_rows,
        )  # fmt: skip
        return None if found is None else found.reshape(*self.groups, -1, 2)

    def blocks(self, rows: int) -> Tensor:
        """Blocks of `rows` rows, (lists x blocks in a tile, 9) int32, longest lists first.

        Of each: first row, group of the batch, of the heads, where in `by_row` its list begins, its
        whole tiles end, and all of it ends; first key that some row of it sees and end, where rows
        see ranges; the first tile of its list, 0 of an empty one.
        """
        name = ("blocks", rows, 0)
        if name not in self._kept:
            start, mid, end = self.ordered_bounds
            item = torch.arange(start.numel(), device=self.device)
            item = item if self.row_order is None else self.row_order.lists.long()
            sub = torch.arange(self.blocks_in_tile(rows), device=self.device)
            group_b = item // (self.groups[1] * self.q_tiles)
            group_h = item // self.q_tiles % self.groups[1]
            row0 = (item % self.q_tiles * self.q_tile)[:, None] + sub * rows
            first, until = self._seen_by_blocks(rows, row0, group_b[:, None], group_h[:, None])
            tiles = torch.nn.functional.pad(self.by_row.tiles, (0, 1))
            tile = tiles[start.long()].where(start < end, 0)
            each = (row0, group_b, group_h, start, mid, end, first, until, tile)
            wide = (x if x.dim() == 2 else x[:, None].expand(row0.shape) for x in each)
            self._kept[name] = torch.stack([x.int() for x in wide], -1).flatten(0, 1)
        found: Tensor = self._kept[name]
        return found

    def blocks_in_tile(self, rows: int) -> int:
        """Blocks of `rows` rows in a query tile."""
        return -(-min(self.q_tile, self.q_rows) // rows)

    def _seen_by_blocks(
        self, rows: int, row0: Tensor, group_b: Tensor, group_h: Tensor
    ) -> tuple[Tensor, Tensor]:
        table = self.key_ranges
        if table is None:
            return torch.zeros_like(row0), torch.full_like(row0, self.kv_rows)
        nothing = torch.iinfo(torch.int32).max
        low, high = table.unbind(-1)
        low, high = low.masked_fill(low >= high, nothing), high.masked_fill(low >= high, 0)
        spare = (0, -low.shape[-1] % rows)
        low = torch.nn.functional.pad(low, spare, value=nothing).unflatten(-1, (-1, rows)).amin(-1)
        high = torch.nn.functional.pad(high, spare).unflatten(-1, (-1, rows)).amax(-1)
        at = [0 if low.shape[0] == 1 else group_b, 0 if low.shape[1] == 1 else group_h]
        block = (row0 // rows).clamp_max(low.shape[2] - 1)
        return low[at[0], at[1], block], high[at[0], at[1], block]

    @cached_property
    def row_kinds(self) -> Tensor:
        """The kinds of `by_row` where bit tiles are taken by `key_ranges`."""
        return torch.where(self.by_row.kinds > 0, KEY_RANGE, self.by_row.kinds)

    @cached_property
    def key_kinds(self) -> Tensor:
        """The kinds of `by_key` where bit tiles are taken by `row_ranges`."""
        return torch.where(self.by_key.kinds > 0, ROW_RANGE, self.by_key.kinds)

    @property
    def _only_bits(self) -> bool:
        return self.key_range is None and self.row_range is None and self.gathered is None

    @cached_property
    def longest(self) -> int:
        """Entries in the longest list of a query tile; with one tile for each group, their mean."""
        if self.q_tiles == 1:  # lists may be new: they aren't waited for
            return -(-self.cols.numel() // max(1, self.ptr.numel() // 2))
        return int(self.ptr.diff(dim=-1).max()) if self.ptr.numel() > 1 else 0

    @cached_property
    def by_key(self) -> Lists:
        """The query tiles of each key tile, and of each tile of single keys."""
        flipped = self.transposed
        rows, kinds = flipped.rows, self.kinds[flipped.entries]
        whole = (kinds == FULL) & (rows < self.q_rows // self.q_tile)
        if self.q_index is not None:
            whole = torch.zeros_like(whole)
        counts = (flipped.ptr[..., 1:] - flipped.ptr[..., :-1]).reshape(-1)
        start = flipped.ptr[..., :-1].reshape(-1).contiguous()
        owner = torch.repeat_interleave(
            torch.arange(counts.numel(), device=self.device), counts, output_size=rows.numel()
        )
        order = torch.argsort(owner * 2 + (~whole).long(), stable=True)
        inside = torch.bincount(owner[whole], minlength=counts.numel())
        return _lists(rows, kinds, order, start, inside, counts, self.groups)

    @cached_property
    def _kept(self) -> dict[tuple[str, int, int], Any]:
        """What depends on numbers of heads, or of blocks, too; making it waits for the GPU.

        Never this plan itself: it would live until cycles are collected.
        """
        return {}

    def finer(self, rows: int, keys: int) -> Plan:
        """The plan for blocks of `rows` x `keys`: of smaller tiles, or where that drops none this.

        In decoding lists are new at each step, and stay as they are.
        """
        if self.q_tiles == 1:
            return self
        name = ("finer", rows, keys)
        if name not in self._kept:
            smaller = finer(self, rows, keys)
            self._kept[name] = None if smaller is None else plan_of(smaller)
        found: Plan | None = self._kept[name]
        return self if found is None else found

    def key_order(self, heads: int, kv_heads: int, every: bool = False) -> Order:
        """Visited key tiles through (Bm, 1 or Hkv, tiles), or all, as `_local` has them."""
        name = ("all" if every else "order", heads, kv_heads)
        if name not in self._kept:
            self._kept[name] = self._key_order(heads, kv_heads, every)
        order: Order = self._kept[name]
        return order

    def _key_order(self, heads: int, kv_heads: int, every: bool) -> Order:
        work = self.by_key.work
        if work.shape[1] > 1:
            work = work.repeat_interleave(heads // work.shape[1], 1)
            work = work.unflatten(1, (kv_heads, -1)).sum(2)
        order = _local(work)
        lists = order.lists
        return order if every else Order(lists[work.reshape(-1)[lists] > 0], order.giants)

    def key_slots(self, heads: int, kv_heads: int) -> Slots:
        """Where the slots of visited key tiles, numbered as in `key_order`, hold each key."""
        name = ("slots", heads, kv_heads)
        if name not in self._kept:
            self._kept[name] = self._key_slots(self.key_order(heads, kv_heads).lists, kv_heads)
        slots: Slots = self._kept[name]
        return slots

    def _key_slots(self, order: Tensor, kv_heads: int) -> Slots:
        groups_h = 1 if self.groups[1] == 1 else kv_heads
        width = self.by_key.work.shape[2]
        group, col = order.long() // width, order.long() % width
        place = col[:, None] * self.kv_tile + torch.arange(self.kv_tile, device=self.device)
        if self.gathered is not None:
            listed = self.gathered[(col - self.kv_tiles).clamp_min(0)].long()
            place = torch.where((col >= self.kv_tiles)[:, None], listed, place)
        real = (place >= 0) & (place < self.kv_rows)
        key = place
        if self.kv_index is not None:
            table = self.kv_index.expand(*self.groups, -1)
            size = max(1, groups_h // self.groups[1])  # key heads of one list
            b, h = group // groups_h, group % groups_h // size
            h = h.clamp_max(self.groups[1] - 1)
            key = table[b[:, None], h[:, None], place.clamp(0, self.kv_rows - 1)].long()
            real = real & (key >= 0)
        last = self.groups[0] * groups_h * self.kv_len
        which = torch.where(real, group[:, None] * self.kv_len + key, last).reshape(-1)
        slots = torch.argsort(which, stable=True)
        counts = torch.bincount(which, minlength=last + 1)[:last]
        begin = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return Slots(begin, slots)

    @cached_property
    def row_words(self) -> Tensor:
        """The bit tiles as words along the keys: (n, q_tile, ceil(kv_tile / 32)) int32."""
        return _words(bitset.unpack(self.bits, self.q_tile))

    @cached_property
    def key_words(self) -> Tensor:
        """The bit tiles as words along the queries: (n, kv_tile, ceil(q_tile / 32)) int32."""
        return _words(bitset.unpack(self.bits, self.q_tile).mT)

    @cached_property
    def seen_keys(self) -> Tensor:
        """The keys of each bit tile that some row sees: (n, ceil(kv_tile / 32)) int32."""
        return _words(bitset.unpack(self.bits, self.q_tile).any(1))

    @cached_property
    def query_places(self) -> Repeats:
        """Where each query stands among the rows of `q_index`."""
        assert self.q_index is not None
        return _repeats(self.q_index, self.q_len)

    @cached_property
    def keys_stand_once(self) -> bool:
        """Whether no key stands in two slots, so that its gradient has one home."""
        if self.gathered is not None:
            return False
        return self.kv_index is None or _repeats(self.kv_index, self.kv_len).unique


def _lists(
    tiles: Tensor,
    kinds: Tensor,
    order: Tensor,
    start: Tensor,
    inside: Tensor,
    counts: Tensor,
    groups: tuple[int, int],
) -> Lists:
    """Lists in a new order; a partial tile counts for more than a whole one, by about a half."""
    work = 2 * inside + 3 * (counts - inside)
    return Lists(
        tiles[order].int(),
        kinds[order].int(),
        start,
        start + inside,
        start + counts,
        work.reshape(*groups, -1),
    )


def _local(work: Tensor) -> Order:
    """An order of the lists of (Bm, Hm, tiles) that fills the chip and keeps its cache warm.

    First those with over `_GIANT` times the mean work. Then group by group, so that what runs
    together reads one head; the groups, and the lists in each, with the most work first, so that
    the last ones to run are short.
    """
    flat = work.flatten(0, 1)
    groups = torch.argsort(flat.sum(-1), stable=True, descending=True)
    inside = torch.argsort(flat[groups], dim=-1, stable=True, descending=True)
    order = (groups[:, None] * work.shape[-1] + inside).reshape(-1)
    giant = (flat > _GIANT * flat.float().mean()).reshape(-1)[order]
    order = order[torch.argsort((~giant).byte(), stable=True)]
    return Order(order.int(), int(giant.sum()))


def _words(tiles: Tensor) -> Tensor:
    """Booleans (..., n) as int32 words along the last axis, bit j % 32 of word j // 32."""
    spare = -tiles.shape[-1] % 32
    wide = torch.nn.functional.pad(tiles, (0, spare)).unflatten(-1, (-1, 32))
    powers = torch.ones(32, dtype=torch.int64, device=tiles.device) << torch.arange(
        32, device=tiles.device
    )
    parts = [(part.long() * powers).sum(-1).int() for part in wide.split(4096)]
    return torch.cat(parts) if parts else wide.new_zeros(wide.shape[:-1], dtype=torch.int32)


def _repeats(index: Tensor, length: int) -> Repeats:
    """The inverse of a table of indices (Bi, Hi, n), -1 is nothing."""
    batches, heads, n = index.shape
    flat = index.reshape(-1, n).long()
    group = torch.arange(flat.shape[0], device=index.device)[:, None]
    which = torch.where(flat < 0, flat.shape[0] * length, group * length + flat).reshape(-1)
    order = torch.argsort(which, stable=True)
    counts = torch.bincount(which, minlength=flat.shape[0] * length + 1)[:-1]
    copies = max(1, int(counts.max())) if counts.numel() else 1
    at = torch.full((flat.shape[0] * length, copies), -1, dtype=torch.int32, device=index.device)
    named = which[order]
    named = named[named < flat.shape[0] * length]
    order = order[: len(named)]
    rank = torch.arange(len(named), device=index.device) - (counts.cumsum(0) - counts)[named]
    at[named, rank] = (order % n).int()
    return Repeats(copies == 1, at.reshape(batches, heads, length, copies))
