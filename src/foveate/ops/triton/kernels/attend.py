"""The forward: online softmax over the tiles that a block of query rows visits.

m_i = max_j s_ij, l_i = sum_j exp2(s_ij - m_i), o_i = sum_j exp2(s_ij - m_i) v_j / l_i with scores
in units of log 2 (Dao 2023, arXiv:2307.08691, algorithm 1); lse_i = ln 2 (m_i + log2 l_i). Whole
tiles come first in each list and are taken without a mask; then those of which elements, or single
keys, count. The heads that share a key head are rows of one block (`PACK`), and a list may be cut
into `splits` parts, whose results are merged by their lse (Flash-Decoding).
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from foveate.ops.triton.kernels.programs import own_rows, row_program
from foveate.ops.triton.kernels.tiles import (
    LN2,
    add_bias,
    any_bits,
    bend_scores,
    copy_tile,
    dot,
    exponentials,
    in_range,
    key_step,
    list_bounds,
    load_rows,
    load_some,
    load_tile,
    next_kind,
    next_tile,
    or_none,
    range_of,
    seen_pairs,
    some_row_sees,
)

VARYING = [
    "q_len", "kv_len", "q_rows", "kv_rows", "q_tiles", "kv_tiles", "groups_h", "batches", "packs",
    "subs", "items", "giants", "splits", "b_first", "b_count", "o_s", "l_s", "l_b", "l_h", "qi_b",
    "qi_h", "ki_b", "ki_h", "kr_b", "kr_h", "rr_b", "rr_h",
]  # fmt: skip


@triton.jit
def update(
    acc, total, top, scores, v, scale, FOLD: tl.constexpr, GUARD: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax; `GUARD` where a row may have seen nothing yet."""
    high = tl.max(scores, 1)
    if FOLD:
        high = high * scale
    new = tl.maximum(top, high)
    base = new
    if GUARD:
        base = tl.where(new == float("-inf"), 0.0, new)
    weights = exponentials(scores, scale, base[:, None], FOLD)
    keep = tl.exp2(top - base)
    total = total * keep + tl.sum(weights, 1)
    acc = dot(weights.to(v.dtype), v, acc * keep[:, None], PRECISION, WIDEN)
    return acc, total, new


@triton.jit(do_not_specialize=VARYING)
def attend(
    Q, K, V, O, L, B,
    K_TILES, V_TILES,
    COLS, KINDS, START, MID, END, ORDER, WORDS, ALIVE, GATHERED, Q_INDEX, KV_INDEX, KEY_RANGE,
    ROW_RANGE,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_s, o_b, o_h, o_l, l_s, l_b, l_h,
    b_b, b_h, b_q, b_k, b_first, b_count,
    qi_b, qi_h, ki_b, ki_h, kr_b, kr_h, rr_b, rr_h,
    q_len, kv_len, q_rows, kv_rows, q_tiles, kv_tiles, groups_h, batches, packs, subs, items,
    giants, splits, scale, cap,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr,
    Q_TILE: tl.constexpr, KV_TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    VECTOR: tl.constexpr, PACK: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr,
    FOLD: tl.constexpr, BIAS: tl.constexpr, BIAS_ROW: tl.constexpr, BIAS_COL: tl.constexpr,
    SHARED: tl.constexpr, VIRTUAL: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One block of rows (program axis 0, see `row_program`) and one part of its list (axis 1).

    `SHARED`: the values are the first DV elements of the keys. `VIRTUAL`: rows
    are put out where they stand in the tiles, to be merged where a query stands in several.
    """
    split = tl.program_id(1)
    item, tile, sub, group_b, group_h, batch, head0 = row_program(
        tl.program_id(0), ORDER, subs, packs, groups_h, batches, q_tiles, items, giants, PACK
    )
    kv_head = head0 // GROUP
    line, row, query, head, live = own_rows(
        tile, sub, head0, Q_INDEX, group_b * qi_b + group_h * qi_h, q_rows, Q_TILE, M, PACK
    )

    d1 = tl.arange(0, D1)
    d2 = D1 + tl.arange(0, D2 if D2 > 0 else 16)
    dv = tl.arange(0, DV1)
    n = tl.arange(0, N)
    b64, h64, q64 = batch.to(tl.int64), head.to(tl.int64), query.to(tl.int64)
    q_at = b64 * q_b + h64 * q_h + q64 * q_l
    q1 = load_rows(Q, q_at, d1, live, D, D1)
    if D2 > 0:
        q2 = load_rows(Q, q_at, d2, live, D, D1 + D2)
    k_base = K + b64 * k_b + kv_head.to(tl.int64) * k_h
    v_base = V + b64 * v_b + kv_head.to(tl.int64) * v_h
    if BIAS > 0:
        b_head = b64 * b_b + head0.to(tl.int64) * b_h
        if PACK > 1:
            b_head = (b64 * b_b + h64 * b_h)[:, None]
        shift = kv_len - q_len

    # This program's part of the list, whole tiles and others.
    start, mid, others, whole = list_bounds(COLS, START, MID, END, item, kv_rows, KV_TILE, VECTOR)
    whole_steps = whole * (KV_TILE // N)
    steps = whole_steps + tl.cdiv(others * KV_TILE, N)
    share = tl.cdiv(steps, splits)
    lo = split * share
    hi = tl.minimum(lo + share, steps)

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV1], tl.float32)

    # The tile of a step is read a step early, where tiles are runs of keys.
    PLAIN: tl.constexpr = not VECTOR and KV_INDEX is None and GATHERED is None
    PER: tl.constexpr = max(1, KV_TILE // N)
    begin, end = tl.maximum(lo, whole_steps) - whole_steps, hi - whole_steps
    if PLAIN:
        col, sort = next_kind(begin, end, COLS, KINDS, mid, PER)
    if not VECTOR and KV_INDEX is None:
        last = tl.minimum(hi, whole_steps)
        ahead = next_tile(lo, last, COLS, start, KV_TILE // N)
        for step in tl.range(lo, last, num_stages=STAGES):
            key0 = ahead * KV_TILE + step % (KV_TILE // N) * N
            ahead = next_tile(step + 1, last, COLS, start, KV_TILE // N)
            if K_TILES is not None:
                k1 = copy_tile(K_TILES, batch, kv_head, key0, N, D1)
            else:
                k1 = load_tile(k_base, key0, k_l, n, d1, D, D1)
            k1 = k1.to(q1.dtype)  # keys may have 8 bits
            raw = dot(q1, tl.trans(k1), tl.zeros([M, N], tl.float32), PRECISION, WIDEN)
            if D2 > 0:
                k2 = load_tile(k_base, key0, k_l, n, d2, D, D1 + D2).to(q1.dtype)
                raw = dot(q2, tl.trans(k2), raw, PRECISION, WIDEN)
            scores, _ = bend_scores(raw, scale, cap, SOFTCAP, FOLD)
            if BIAS > 0:
                scores = add_bias(
                    scores, B, b_head, query[:, None], (key0 + n)[None, :], live[:, None], b_q, b_k,
                    b_first, b_count, shift, BIAS, BIAS_ROW, BIAS_COL,
                )  # fmt: skip
            if SHARED:
                v = k1
            elif V_TILES is not None:
                v = copy_tile(V_TILES, batch, kv_head, key0, N, DV1)
            else:
                v = load_tile(v_base, key0, v_l, n, dv, DV, DV1)
            acc, total, top = update(
                acc, total, top, scores, v.to(q1.dtype), scale, FOLD, BIAS > 0, PRECISION, WIDEN
            )

    low, high, row_low, row_high = line, line, n, n
    if KEY_RANGE is not None:
        low, high = range_of(KEY_RANGE, group_b * kr_b + group_h * kr_h, row, live)
        least = tl.min(tl.where(live & (low < high), low, 2147483647), 0)
        most = tl.max(tl.where(low < high, high, 0), 0)
    for step in tl.range(begin, end, num_stages=STAGES):
        if PLAIN:
            first = step % PER * N
            key0, kind = col * KV_TILE + first, sort
            place = key0 + n
            inside = place < kv_rows
            there = inside
            if ALIVE is not None:
                there = there & any_bits(ALIVE, kind, first, KV_TILE, N)
            key = place
            col, sort = next_kind(step + 1, end, COLS, KINDS, mid, PER)
        else:
            place, key, kind, first, there = key_step(
                step, mid, others, COLS, KINDS, GATHERED, ALIVE, KV_INDEX,
                group_b * ki_b + group_h * ki_h, kv_tiles, kv_rows, KV_TILE, N, VECTOR,
            )  # fmt: skip
            inside = there
        if KEY_RANGE is not None:
            there = there & in_range(place, kind, least, most, -1)
        if ROW_RANGE is not None:
            row_low, row_high = range_of(ROW_RANGE, group_b * rr_b + group_h * rr_h, place, there)
            there = there & ((kind != -2) | (row_low < row_high))
        if VECTOR and N > 16:
            seen = seen_pairs(
                there, WORDS, KEY_RANGE, ROW_RANGE, kind, line, first, row, place, low,
                high, row_low, row_high, kv_rows, -1, Q_TILE, KV_TILE, N, VECTOR, PLAIN,
            )  # fmt: skip
            there = there & some_row_sees(seen, live)
        key = or_none(key, there)
        k_at = key.to(tl.int64) * k_l
        # A key that nobody sees has no score, whatever it holds; as a value it must be 0.
        if PLAIN and K_TILES is not None and not SHARED:
            k1 = copy_tile(K_TILES, batch, kv_head, key0, N, D1)
        elif PLAIN:
            k1 = load_some(k_base, key0, k_l, n, d1, there, D, D1)
        else:
            k1 = load_rows(k_base, k_at, d1, there, D, D1)
        k1 = k1.to(q1.dtype)
        raw = dot(q1, tl.trans(k1), tl.zeros([M, N], tl.float32), PRECISION, WIDEN)
        if D2 > 0:
            if PLAIN:
                k2 = load_some(k_base, key0, k_l, n, d2, there, D, D1 + D2)
            else:
                k2 = load_rows(k_base, k_at, d2, there, D, D1 + D2)
            raw = dot(q2, tl.trans(k2.to(q1.dtype)), raw, PRECISION, WIDEN)
        scores, _ = bend_scores(raw, scale, cap, SOFTCAP, FOLD)
        if BIAS > 0:
            scores = add_bias(
                scores, B, b_head, query[:, None], key[None, :], live[:, None] & there[None, :],
                b_q, b_k, b_first, b_count, shift, BIAS, BIAS_ROW, BIAS_COL,
            )  # fmt: skip
        if not (VECTOR and N > 16):
            seen = seen_pairs(
                inside, WORDS, KEY_RANGE, ROW_RANGE, kind, line, first, row, place, low,
                high, row_low, row_high, kv_rows, -1, Q_TILE, KV_TILE, N, VECTOR, PLAIN,
            )  # fmt: skip
        scores = tl.where(seen, scores, float("-inf"))
        if SHARED:
            v = k1
        elif PLAIN:
            v = load_some(v_base, key0, v_l, n, dv, there, DV, DV1)
        else:
            v = load_rows(v_base, key.to(tl.int64) * v_l, dv, there, DV, DV1)
        acc, total, top = update(
            acc, total, top, scores, v.to(q1.dtype), scale, FOLD, True, PRECISION, WIDEN
        )

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    to = q64
    if VIRTUAL:
        to = row.to(tl.int64)
    o_at = split.to(tl.int64) * o_s + b64 * o_b + h64 * o_h + to * o_l
    l_at = split.to(tl.int64) * l_s + b64 * l_b + h64 * l_h + to
    mask = live[:, None] & (dv < DV)[None, :]
    tl.store(O + o_at[:, None] + dv[None, :], acc.to(O.dtype.element_ty), mask=mask)
    tl.store(L + l_at, lse, mask=live)
