"""Which list, head and rows a program works on: what those that own a block begin with."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def list_of(number, giants, count, times):
    """(place of a list in the order, which of its `times` users): see `plan.Order`.

    Users count slower than lists, among the giants first and then among the others.
    """
    late = number >= giants * times
    first = tl.where(late, giants, 0)
    width = tl.maximum(tl.where(late, count - giants, giants), 1)
    number -= tl.where(late, giants * times, 0)
    return first + number % width, number // width


@triton.jit
def row_program(
    pid, ORDER, subs, packs, groups_h, batches, q_tiles, items, giants, PACK: tl.constexpr
):  # fmt: skip
    """What a program that owns rows works on.

    Returns (its place in the order, tile, block, group of the batch, of the heads, batch entry,
    first head). Programs count (batch entry, pack of heads, list, block of rows in the tile): those
    that run together read the same keys, and each head's longest lists come first.
    """
    sub = pid % subs
    packs_in = packs // groups_h
    place, rest = list_of(pid // subs, giants, items, packs_in * batches)
    pack_in = rest % packs_in
    batch_in = rest // packs_in
    item = place
    if ORDER is not None:
        item = tl.load(ORDER + place)
    tile = item % q_tiles
    group = item // q_tiles
    group_h = group % groups_h
    group_b = group // groups_h
    batch = group_b + batch_in  # one of them is 0
    head0 = (group_h * packs_in + pack_in) * PACK
    return place, tile, sub, group_b, group_h, batch, head0


@triton.jit
def own_rows(
    tile, sub, head0, Q_INDEX, at_index, q_rows, Q_TILE: tl.constexpr, M: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    """The rows of a block: (place in the tile, virtual row, query or -1, head, which exist)."""
    line = sub * M + tl.arange(0, M)
    head = head0 + line % PACK
    line = line // PACK
    row = tile * Q_TILE + line
    live = (line < Q_TILE) & (row < q_rows)
    query = row
    if Q_INDEX is not None:
        query = tl.load(Q_INDEX + at_index + row, mask=live, other=-1)
        live = live & (query >= 0)
    return line, row, tl.where(live, query, -1), head, live
