"""The backward, from the lse of the forward, without atomic additions to dq, dk or dv.

With p_ij = exp(s_ij - lse_i) and delta_i = sum_d do_id o_id - dlse_i (Dao 2023, arXiv:2307.08691,
algorithm 2):

    dv_j = sum_i p_ij do_i,  ds_ij = p_ij (do_i . v_j - delta_i),  dq_i = scale sum_j ds_ij k_j,
    dk_j = scale sum_i ds_ij q_i,  dbias_ij = ds_ij

`query_gradient` owns rows and streams keys by the lists of the layout; it also puts out the lse and
delta of its rows. `key_gradient` (in its own file) owns keys and streams rows by their transpose.
With a softcap c tanh(x / c), ds is multiplied by 1 - tanh^2 on its way to q and k.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from foveate.ops.triton.kernels.programs import own_rows, row_program
from foveate.ops.triton.kernels.tiles import (
    LOG2E,
    add_bias,
    any_bits,
    bend_scores,
    bias_offsets,
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
    "subs", "items", "giants", "b_first", "b_count", "l_b", "l_h", "qi_b", "qi_h", "ki_b", "ki_h",
    "kr_b", "kr_h", "rr_b", "rr_h", "width", "list_heads", "list_size", "heads_in", "visited",
]  # fmt: skip


@triton.jit
def row_numbers(
    O, G, g, LSE, DLSE, BASE, DELTA, o_at, l_at, flat, dv, live, DV: tl.constexpr,
    DV1: tl.constexpr,
):  # fmt: skip
    """Each row's lse in units of log 2, infinite without keys, so that p is 0, and its delta.

    Both are put out in fp32 for the pass that owns keys; a row in several tiles is put out by each
    of them, and always the same.
    """
    delta = tl.zeros_like(flat).to(tl.float32)
    if G is not None:
        o = load_rows(O, o_at, dv, live, DV, DV1)
        delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + flat, mask=live, other=0.0)
    lse = tl.load(LSE + flat, mask=live, other=float("-inf"))
    base = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    tl.store(BASE + l_at, base, mask=live)
    tl.store(DELTA + l_at, delta, mask=live)
    return base[:, None], delta[:, None]


@triton.jit
def keep_bias_gradient(
    DB, unit, ds, head, row, key, seen, g_q, g_k, first, count, shift, MODE: tl.constexpr,
    ROW: tl.constexpr, COL: tl.constexpr,
):  # fmt: skip
    """Store ds where each element has a place of its own (mode 1), or add it up (mode 2 and 3).

    Sums are taken in 64-bit fixed point, `unit` to 1, so that their order doesn't matter. Mode 3 is
    a relative bias.
    """
    at = bias_offsets(head, row, key, g_q, g_k, first, count, shift, MODE == 3, ROW, COL)
    if MODE == 1:
        at += row * 0 + key * 0  # one query or one key: its axis of the table has no stride
        tl.store(DB + at, ds, mask=seen)
    elif MODE == 3 or (ROW and COL):
        tl.atomic_add(DB + at, (ds * unit).to(tl.int64), mask=seen, sem="relaxed")
    elif ROW:
        part = tl.sum(ds, 1)[:, None]
        tl.atomic_add(DB + at, (part * unit).to(tl.int64), mask=row >= 0, sem="relaxed")
    elif COL:
        part = tl.sum(ds, 0)[None, :]
        tl.atomic_add(DB + at, (part * unit).to(tl.int64), mask=key >= 0, sem="relaxed")
    else:
        tl.atomic_add(DB + at, (tl.sum(ds) * unit).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=VARYING)
def query_gradient(
    Q, K, V, G, O, LSE, DLSE, BASE, DELTA, DQ, B, DB, UNIT,
    K_TILES, V_TILES,
    COLS, KINDS, START, MID, END, ORDER, WORDS, ALIVE, GATHERED, Q_INDEX, KV_INDEX, KEY_RANGE,
    ROW_RANGE,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, o_b, o_h, o_l, dq_b, dq_h, dq_l,
    l_b, l_h,
    b_b, b_h, b_q, b_k, b_first, b_count, db_b, db_h, db_q, db_k,
    qi_b, qi_h, ki_b, ki_h, kr_b, kr_h, rr_b, rr_h,
    q_len, kv_len, q_rows, kv_rows, q_tiles, kv_tiles, groups_h, batches, packs, subs, items,
    giants, scale, cap, slope,
    D: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr,
    Q_TILE: tl.constexpr, KV_TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    VECTOR: tl.constexpr, PACK: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr,
    FOLD: tl.constexpr, BIAS: tl.constexpr, BIAS_ROW: tl.constexpr, BIAS_COL: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr, VIRTUAL: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Dq of one block of rows, its rows' numbers, and its part of the bias's gradient.

    LSE and DLSE are (B, Hq, Lq), contiguous; BASE and DELTA, of l_b and l_h, are written. `slope`
    is scale itself.
    """
    item, tile, sub, group_b, group_h, batch, head0 = row_program(
        tl.program_id(0), ORDER, subs, packs, groups_h, batches, q_tiles, items, giants, PACK
    )
    kv_head = head0 // GROUP
    line, row, query, head, live = own_rows(
        tile, sub, head0, Q_INDEX, group_b * qi_b + group_h * qi_h, q_rows, Q_TILE, M, PACK
    )

    d = tl.arange(0, D1)
    dv = tl.arange(0, DV1)
    n = tl.arange(0, N)
    b64, h64, q64 = batch.to(tl.int64), head.to(tl.int64), query.to(tl.int64)
    q = load_rows(Q, b64 * q_b + h64 * q_h + q64 * q_l, d, live, D, D1)
    if G is not None:
        g = load_rows(G, b64 * g_b + h64 * g_h + q64 * g_l, dv, live, DV, DV1)
    else:
        g = q
    lse, delta = row_numbers(
        O, G, g, LSE, DLSE, BASE, DELTA, b64 * o_b + h64 * o_h + q64 * o_l,
        b64 * l_b + h64 * l_h + q64, (b64 * (packs * PACK) + h64) * q_len + q64, dv, live, DV, DV1,
    )  # fmt: skip
    k_base = K + b64 * k_b + kv_head.to(tl.int64) * k_h
    v_base = V + b64 * v_b + kv_head.to(tl.int64) * v_h
    if BIAS > 0:
        b_head = b64 * b_b + head0.to(tl.int64) * b_h
        db_head = b64 * db_b + head0.to(tl.int64) * db_h
        shift = kv_len - q_len
    unit = 1.0
    if BIAS_GRADIENT > 1:
        unit = tl.load(UNIT)

    start, mid, others, whole = list_bounds(COLS, START, MID, END, item, kv_rows, KV_TILE, VECTOR)
    acc = tl.zeros([M, D1], tl.float32)
    # The tile of a step is read a step early, as in the forward.
    PLAIN: tl.constexpr = not VECTOR and KV_INDEX is None and GATHERED is None
    PER: tl.constexpr = max(1, KV_TILE // N)
    last = tl.cdiv(others * KV_TILE, N)
    if PLAIN:
        col, sort = next_kind(0, last, COLS, KINDS, mid, PER)
    if not VECTOR and KV_INDEX is None:
        whole_steps = whole * (KV_TILE // N)
        ahead = next_tile(0, whole_steps, COLS, start, KV_TILE // N)
        for step in tl.range(0, whole_steps, num_stages=STAGES):
            key0 = ahead * KV_TILE + step % (KV_TILE // N) * N
            ahead = next_tile(step + 1, whole_steps, COLS, start, KV_TILE // N)
            if K_TILES is not None:
                k = copy_tile(K_TILES, batch, kv_head, key0, N, D1)
            else:
                k = load_tile(k_base, key0, k_l, n, d, D, D1)
            raw = dot(q, tl.trans(k), tl.zeros([M, N], tl.float32), PRECISION, WIDEN)
            scores, bent = bend_scores(raw, scale, cap, SOFTCAP, FOLD)
            if BIAS > 0:
                scores = add_bias(
                    scores, B, b_head, query[:, None], (key0 + n)[None, :], live[:, None], b_q, b_k,
                    b_first, b_count, shift, BIAS, BIAS_ROW, BIAS_COL,
                )  # fmt: skip
            ds = exponentials(scores, scale, lse, FOLD)
            if G is not None:
                if V_TILES is not None:
                    v = copy_tile(V_TILES, batch, kv_head, key0, N, DV1)
                else:
                    v = load_tile(v_base, key0, v_l, n, dv, DV, DV1)
                dp = dot(g, tl.trans(v), tl.zeros([M, N], tl.float32), PRECISION, WIDEN)
                ds = ds * (dp - delta)
            else:
                ds = ds * (0.0 - delta)
            if BIAS_GRADIENT > 0:
                keep_bias_gradient(
                    DB, unit, ds, db_head, query[:, None], (key0 + n)[None, :],
                    live[:, None] & (n >= 0)[None, :], db_q, db_k, b_first, b_count, shift,
                    BIAS_GRADIENT, BIAS_ROW, BIAS_COL,
                )  # fmt: skip
            if SOFTCAP:
                ds = ds * (1.0 - bent * bent)
            acc = dot(ds.to(k.dtype), k, acc, PRECISION, WIDEN)

    low, high, row_low, row_high = line, line, n, n
    if KEY_RANGE is not None:
        low, high = range_of(KEY_RANGE, group_b * kr_b + group_h * kr_h, row, live)
        least = tl.min(tl.where(live & (low < high), low, 2147483647), 0)
        most = tl.max(tl.where(low < high, high, 0), 0)
    for step in tl.range(0, last, num_stages=STAGES):
        if PLAIN:
            first = step % PER * N
            key0, kind = col * KV_TILE + first, sort
            place = key0 + n
            inside = place < kv_rows
            there = inside
            if ALIVE is not None:
                there = there & any_bits(ALIVE, kind, first, KV_TILE, N)
            key = place
            col, sort = next_kind(step + 1, last, COLS, KINDS, mid, PER)
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
                there, WORDS, KEY_RANGE, ROW_RANGE, kind, line, first, row,
                place, low, high, row_low, row_high, kv_rows, -1, Q_TILE, KV_TILE, N, VECTOR, PLAIN,
            )  # fmt: skip
            there = there & some_row_sees(seen, live)
        key = or_none(key, there)
        if PLAIN:
            k = load_some(k_base, key0, k_l, n, d, there, D, D1)
        else:
            k = load_rows(k_base, key.to(tl.int64) * k_l, d, there, D, D1)
        raw = dot(q, tl.trans(k), tl.zeros([M, N], tl.float32), PRECISION, WIDEN)
        scores, bent = bend_scores(raw, scale, cap, SOFTCAP, FOLD)
        if BIAS > 0:
            scores = add_bias(
                scores, B, b_head, query[:, None], key[None, :], live[:, None] & there[None, :],
                b_q, b_k, b_first, b_count, shift, BIAS, BIAS_ROW, BIAS_COL,
            )  # fmt: skip
        if not (VECTOR and N > 16):
            seen = seen_pairs(
                inside, WORDS, KEY_RANGE, ROW_RANGE, kind, line, first, row,
                place, low, high, row_low, row_high, kv_rows, -1, Q_TILE, KV_TILE, N, VECTOR, PLAIN,
            )  # fmt: skip
        p = exponentials(tl.where(seen, scores, float("-inf")), scale, lse, FOLD)
        if G is not None:
            if PLAIN and V_TILES is not None:
                v = copy_tile(V_TILES, batch, kv_head, key0, N, DV1)
            elif PLAIN:
                v = load_some(v_base, key0, v_l, n, dv, there, DV, DV1)
            else:
                v = load_rows(v_base, key.to(tl.int64) * v_l, dv, there, DV, DV1)
            dp = dot(g, tl.trans(v), tl.zeros([M, N], tl.float32), PRECISION, WIDEN)
            ds = p * (dp - delta)
        else:
            ds = p * (0.0 - delta)
        ds = tl.where(p == 0.0, 0.0, ds)  # the value of a key that nobody sees may be anything
        if BIAS_GRADIENT > 0:
            keep_bias_gradient(
                DB, unit, ds, db_head, query[:, None], key[None, :], seen & live[:, None], db_q,
                db_k, b_first, b_count, shift, BIAS_GRADIENT, BIAS_ROW, BIAS_COL,
            )  # fmt: skip
        if SOFTCAP:
            ds = ds * (1.0 - bent * bent)
        acc = dot(ds.to(k.dtype), k, acc, PRECISION, WIDEN)

    to = q64
    if VIRTUAL:
        to = row.to(tl.int64)
    at = b64 * dq_b + h64 * dq_h + to * dq_l
    mask = live[:, None] & (d < D)[None, :]
    tl.store(DQ + at[:, None] + d[None, :], (acc * slope).to(DQ.dtype.element_ty), mask=mask)
