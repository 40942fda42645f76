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
    """acc + a @ b; `WIDEN` is for the interpreter, which has no arithmetic in bf16."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


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
        entry = tl.where(live, entry, 0)
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
    WORDS, kind, line, at, LINES: tl.constexpr, SIDE: tl.constexpr, N: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Which elements the bit tiles show: (lines, N) bool, all of them where the kind is no bit tile.

    A line is a row (or key) of the owned block, its place in its tile; bit j of its words is the
    j-th slot of a streamed tile of `SIDE` slots. `at` is the slot of each element with `VECTOR`,
    else the first slot.
    """
    WIDTH: tl.constexpr = (SIDE + 31) // 32
    there = line < LINES
    pattern = (kind - 1).to(tl.int64)
    if VECTOR:
        some = (kind > 0)[None, :]
        where = (pattern[None, :] * LINES + line[:, None]) * WIDTH + (at // 32)[None, :]
        words = tl.load(WORDS + where, mask=some & there[:, None], other=-1)
        bits = words >> (at % 32)[None, :]
    else:
        n = tl.arange(0, N)
        some = kind > 0
        row = WORDS + (pattern * LINES + line) * WIDTH + at // 32
        words = tl.load(row, mask=some & there, other=-1)[:, None]
        for j in tl.static_range(1, N // 32):
            more = tl.load(row + j, mask=some & there, other=-1)[:, None]
            words = tl.where((n // 32)[None, :] >= j, more, words)
        bits = words >> ((at + n) % 32)[None, :]
    return (bits & 1) != 0


@triton.jit
def any_bits(WORDS, kind, at, SIDE: tl.constexpr, N: tl.constexpr, VECTOR: tl.constexpr):
    """Which streamed slots some row of their bit tile sees, (N,) bool; others are never loaded."""
    WIDTH: tl.constexpr = (SIDE + 31) // 32
    n = tl.arange(0, N)
    slot = at if VECTOR else at + n
    row = WORDS + (kind - 1).to(tl.int64) * WIDTH + slot // 32
    words = tl.load(row, mask=(kind > 0) & (n >= 0), other=-1)
    return ((words >> (slot % 32)) & 1) != 0


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
