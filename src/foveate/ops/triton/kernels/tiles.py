"""What all kernels share: the slots of a list, which of their elements count, scores and biases.

Each program owns a block of one side, rows or keys, and streams the other side by a list of tiles.
A step of the stream takes `N` slots: a part of one tile, or, where tiles don't hold a whole number
of steps (`VECTOR`), slots of several tiles together.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Acc + a @ b; `WIDEN` is for the interpreter, which has no arithmetic in bf16."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def or_none(index, there):
    """The index, or -1; no select, for which Triton 3.7 may choose two layouts and then fail."""
    return index | (there.to(tl.int32) - 1)


@triton.jit
def one_of(first, a, b):
    """Whole numbers: a where `first` is set, else b; no select, as in `or_none`."""
    return b + (a - b) * first.to(tl.int32)


@triton.jit
def list_slots(
    step, base, count, LIST, KINDS, TILE: tl.constexpr, N: tl.constexpr, VECTOR: tl.constexpr
):
    """Step `step` of a list: (tile, kind, slots within it, first slot, which slots exist).

    Tile, kind and first slot are scalars, or with `VECTOR` one for each slot.
    """
    n = tl.arange(0, N)
    if VECTOR:
        slot = step * N + n
        entry = slot // TILE
        within = slot % TILE
        first = within
        live = entry < count
        entry = entry * live.to(tl.int32)
    else:
        entry = step // (TILE // N)
        first = step % (TILE // N) * N
        within = first + n
        live = n >= 0
    if LIST is None:
        tile = base + entry
        kind = tile * 0
    else:
        tile = tl.load(LIST + base + entry)
        kind = tl.load(KINDS + base + entry)
    return tile, kind, within, first, live


@triton.jit
def listed_bits(
    WORDS, kind, line, at, there, LINES: tl.constexpr, SIDE: tl.constexpr, N: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Which elements the bit tiles show, (lines, N) bool; all of them where the kind is another.

    A line is a row (or key) of the owned block, its place in its tile; bit j of its words is the
    j-th slot of a streamed tile of `SIDE` slots. `at` is the slot of each element with `VECTOR`,
    else the first slot, a multiple of 32. Nothing is shown of the slots that aren't `there`.
    """
    WIDTH: tl.constexpr = (SIDE + 31) // 32
    own = line < LINES
    pattern = (kind - 1).to(tl.int64)
    if VECTOR:
        some = (kind > 0)[None, :]
        where = (pattern[None, :] * LINES + line[:, None]) * WIDTH + (at // 32)[None, :]
        words = tl.load(WORDS + where, mask=some & own[:, None], other=-1)
        bits = there[None, :] & (((words >> (at % 32)[None, :]) & 1) != 0)
    else:
        n = tl.arange(0, N)
        some = kind > 0
        row = WORDS + (pattern * LINES + line) * WIDTH + at // 32
        words = tl.load(row, mask=some & own, other=-1)[:, None]
        for j in tl.static_range(1, N // 32):
            more = tl.load(row + j, mask=some & own, other=-1)[:, None]
            words = tl.where(n[None, :] < 32 * j, words, more)
        # One bit for each column, so that an element takes one instruction.
        bit = tl.where(there, 1 << (n & 31), 0)
        bits = (words & bit[None, :]) != 0
    return bits


@triton.jit
def any_bits(WORDS, kind, first, SIDE: tl.constexpr, N: tl.constexpr):
    """Which streamed slots some row of their bit tile sees, (N,) bool; others are never loaded."""
    WIDTH: tl.constexpr = (SIDE + 31) // 32
    n = tl.arange(0, N)
    row = WORDS + (kind - 1).to(tl.int64) * WIDTH + first // 32
    word = tl.load(row, mask=kind > 0, other=-1)
    for j in tl.static_range(1, N // 32):
        word = tl.where(n < 32 * j, word, tl.load(row + j, mask=kind > 0, other=-1))
    return (word & (1 << (n & 31))) != 0


@triton.jit
def in_range(place, kind, low, high, KIND: tl.constexpr):
    """Whether `place` lies in low ... high - 1, True where the kind is another one."""
    return (kind != KIND) | ((place >= low) & (place < high))


@triton.jit
def bend_scores(raw, scale, cap, SOFTCAP: tl.constexpr, FOLD: tl.constexpr):
    """Scores in units of log 2 from q . k; (scores, tanh of the softcap or 0).

    With `FOLD` they stay as they are, and the exponent multiplies them by `scale` in one
    instruction. With a softcap, `scale` is 2 log2(e) scale / c and `cap` is c log2(e).
    """
    bent = 0.0
    if SOFTCAP:
        bent = 1.0 - 2.0 / (tl.exp2(raw * scale) + 1.0)
        raw = bent * cap
    elif not FOLD:
        raw = raw * scale
    return raw, bent


@triton.jit
def bias_offsets(
    head, row, key, b_q, b_k, first, count, shift, RELATIVE: tl.constexpr, ROW: tl.constexpr,
    COL: tl.constexpr,
):  # fmt: skip
    """Offsets into a bias, int64; axes that it doesn't have stay of size 1.

    head: offset of the head, a scalar or for each row; row, key: indices, expanded to two axes.
    """
    at = head
    if ROW:
        at = at + row.to(tl.int64) * b_q
    if RELATIVE:
        entry = key - (row + shift) - first
        at = at + tl.minimum(tl.maximum(entry, 0), count - 1).to(tl.int64) * b_k
    elif COL:
        at = at + key.to(tl.int64) * b_k
    return at


@triton.jit
def add_bias(
    scores, B, head, row, key, live, b_q, b_k, first, count, shift, BIAS: tl.constexpr,
    ROW: tl.constexpr, COL: tl.constexpr,
):  # fmt: skip
    """The scores, in units of log 2, with their bias; `live` says which elements exist."""
    at = bias_offsets(head, row, key, b_q, b_k, first, count, shift, BIAS == 2, ROW, COL)
    if BIAS == 2 or (ROW and COL):
        found = tl.load(B + at, mask=live, other=0.0)
    elif ROW:
        found = tl.load(B + at, mask=row >= 0, other=0.0)
    elif COL:
        found = tl.load(B + at, mask=key >= 0, other=0.0)
    else:
        found = tl.load(B + at)
    return scores + found.to(tl.float32) * LOG2E


@triton.jit
def exponentials(scores, scale, base, FOLD: tl.constexpr):
    """exp2(scores - base), `scores` as `bend_scores` left them."""
    if FOLD:
        found = tl.exp2(scores * scale - base)
    else:
        found = tl.exp2(scores - base)
    return found


@triton.jit
def list_bounds(LIST, START, MID, END, owner, length, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """(where a list begins, where its tiles that aren't whole begin, where it ends, whole tiles).

    Without lists every tile is visited. With `VECTOR` whole tiles are taken like the others.
    """
    if LIST is None:
        start = length * 0
        mid = length // TILE
        end = tl.cdiv(length, TILE)
    else:
        start = tl.load(START + owner)
        mid = tl.load(MID + owner)
        end = tl.load(END + owner)
    if VECTOR:
        mid = start
    return start, mid, (end - mid).to(tl.int32), (mid - start).to(tl.int32)


@triton.jit
def key_step(
    step, base, count, COLS, KINDS, GATHERED, ALIVE, KV_INDEX, at_index, kv_tiles, kv_rows,
    KV_TILE: tl.constexpr, N: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The keys of a step: (virtual key, key, kind, first slot, which exist and are seen at all)."""
    col, kind, within, first, there = list_slots(step, base, count, COLS, KINDS, KV_TILE, N, VECTOR)
    place = col * KV_TILE + within
    if GATHERED is not None:
        single = col >= kv_tiles
        listed = GATHERED + (col - kv_tiles).to(tl.int64) * KV_TILE + within
        place = one_of(single, tl.load(listed, mask=single & there, other=-1), place)
    there = there & (place >= 0) & (place < kv_rows)
    # With VECTOR Triton 3.7 fails to compile this look-up; see `some_row_sees`.
    if ALIVE is not None and not VECTOR:
        there = there & any_bits(ALIVE, kind, first, KV_TILE, N)
    key = place
    if KV_INDEX is not None:
        key = tl.load(KV_INDEX + at_index + place, mask=there, other=-1)
        there = there & (key >= 0)
    return place, key, kind, first, there


@triton.jit
def seen_pairs(
    there, WORDS, OWNED_RANGE, STREAMED_RANGE, kind, line, first, owned, streamed, low, high,
    streamed_low, streamed_high, limit, RANGE_KIND: tl.constexpr, LINES: tl.constexpr,
    SIDE: tl.constexpr, N: tl.constexpr, VECTOR: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Which elements of a step count, bool that expands to (owned, streamed).

    there: which streamed slots exist; what is said of owned ones that don't is anything. low, high:
    what each owned slot sees of the streamed side where the kind is `RANGE_KIND`; streamed_low,
    streamed_high: the other way round, for the other kind of ranges. With `PLAIN` streamed slots
    are those of which all below `limit` exist.
    """
    wide = kind[None, :] if VECTOR else kind
    if WORDS is not None:
        seen = listed_bits(WORDS, kind, line, first, there, LINES, SIDE, N, VECTOR)
    else:
        seen = there[None, :]
    if OWNED_RANGE is not None:
        if VECTOR:
            inside = in_range(streamed[None, :], wide, low[:, None], high[:, None], RANGE_KIND)
        else:  # one comparison for an element: below `begin` the difference is large
            begin = tl.where(kind == RANGE_KIND, low, 0)
            size = tl.maximum(tl.minimum(high, limit) - low, 0)
            width = tl.where(kind == RANGE_KIND, size, limit)
            offset = streamed[None, :] - begin[:, None]
            inside = offset.to(tl.uint32, bitcast=True) < width.to(tl.uint32, bitcast=True)[:, None]
        if PLAIN and WORDS is None:
            seen = inside
        else:
            seen = seen & inside
    if STREAMED_RANGE is not None:
        lows, highs = streamed_low[None, :], streamed_high[None, :]
        seen = seen & in_range(owned[:, None], wide, lows, highs, -3 - RANGE_KIND)
    return seen


@triton.jit
def some_row_sees(seen, live):
    """Which keys of a step some row sees, (N,) bool: others may hold anything, NaN too.

    Steps of 16 keys, which fp32 takes at large head sizes, have no registers left for it.
    """
    return tl.max((seen & live[:, None]).to(tl.int32), 0) > 0


@triton.jit
def range_of(TABLE, at, place, mask):
    """(first, end) of a row's or key's range; (0, 0) where `mask` is not set.

    Neither is negative, so that their difference is a number of 32 bits.
    """
    low = tl.load(TABLE + at + place * 2, mask=mask, other=0)
    high = tl.load(TABLE + at + place * 2 + 1, mask=mask, other=0)
    return tl.maximum(low, 0), tl.maximum(high, 0)


@triton.jit
def load_rows(base, at, columns, live, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a tensor; 0 where `live` isn't set, and from column `SIZE` on (`WIDTH` in all)."""
    mask = live[:, None]
    if WIDTH > SIZE:
        mask = mask & (columns < SIZE)[None, :]
    return tl.load(base + at[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_tile(base, row0, step, n, columns, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Rows row0 ... of a tensor that are all there, (len(n), WIDTH); no mask if it has as many."""
    rows = base + row0.to(tl.int64) * step + n[:, None] * step + columns[None, :]
    if WIDTH <= SIZE:
        found = tl.load(rows)
    else:
        found = tl.load(rows, mask=(columns < SIZE)[None, :], other=0.0)
    return found


@triton.jit
def load_some(base, row0, step, n, columns, live, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """As `load_tile`, with 0 in the rows where `live` isn't set."""
    rows = base + row0.to(tl.int64) * step + n[:, None] * step + columns[None, :]
    mask = live[:, None]
    if WIDTH > SIZE:
        mask = mask & (columns < SIZE)[None, :]
    return tl.load(rows, mask=mask, other=0.0)


@triton.jit
def next_kind(step, last, LIST, KINDS, base, PER: tl.constexpr):
    """(tile, kind) of a step of a list that starts at `base`; 0 from `last` on."""
    tile = base + step // PER
    kind = step * 0
    if LIST is not None:
        kind = tl.load(KINDS + tile, mask=step < last, other=0)
        tile = tl.load(LIST + tile, mask=step < last, other=0)
    return tile, kind


@triton.jit
def copy_tile(TILES, batch, head, row0, N: tl.constexpr, WIDTH: tl.constexpr):
    """Rows row0 ... of one head by Hopper's copy engine, (N, WIDTH): see `call.copied`."""
    return TILES.load([batch, head, row0, 0]).reshape(N, WIDTH)


@triton.jit
def copy_row(TILES, batch, head, row0, N: tl.constexpr):
    """Numbers row0 ... of one head, (N,), likewise."""
    return TILES.load([batch, head, row0]).reshape(N)


@triton.jit
def next_tile(step, last, LIST, start, PER: tl.constexpr):
    """The tile of a step, read a step early so that nothing waits for it; 0 from `last` on."""
    tile = step // PER
    if LIST is not None:
        tile = tl.load(LIST + start + tile, mask=step < last, other=0)
    return tile
