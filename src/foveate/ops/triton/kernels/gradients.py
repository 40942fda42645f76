"""The backward, from the lse of the forward, without atomic additions to dq, dk or dv.

With p_ij = exp(s_ij - lse_i) and delta_i = sum_d do_id o_id - dlse_i (Dao 2023, arXiv:2307.08691,
algorithm 2):

    dv_j = sum_i p_ij do_i,  ds_ij = p_ij (do_i . v_j - delta_i),  dq_i = scale sum_j ds_ij k_j,
    dk_j = scale sum_i ds_ij q_i,  dbias_ij = ds_ij

`query_gradient` owns rows and streams keys by the lists of the layout, `key_gradient` owns keys and
streams rows by their transpose. With a softcap c tanh(x / c), ds is multiplied by 1 - tanh^2 on its
way to q and k.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from foveate.ops.triton.kernels.tiles import (
    LOG2E,
    add_bias,
    any_bits,
    bend_scores,
    bias_offsets,
    dot,
    in_range,
    list_slots,
    listed_bits,
)

VARYING = [
    "q_len", "kv_len", "q_rows", "kv_rows", "q_tiles", "kv_tiles", "groups_h", "batches", "packs",
    "subs", "b_first", "b_count", "l_b", "l_h", "qi_b", "qi_h", "ki_b", "ki_h", "kr_b", "kr_h",
    "rr_b", "rr_h", "width", "list_heads", "list_size", "heads_in",
]  # fmt: skip


@triton.jit(do_not_specialize=["rows", "heads", "length"])
def row_products(
    O, G, DLSE, DELTA, rows, heads, length, o_b, o_h, o_l, g_b, g_h, g_l,
    DV: tl.constexpr, DV1: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """delta (B * Hq * Lq,) in fp32."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    dv = tl.arange(0, DV1)
    live = row < rows
    l, h, b = row % length, row // length % heads, row // length // heads
    mask = live[:, None] & (dv < DV)[None, :]
    delta = tl.zeros([M], tl.float32)
    if G is not None:
        o = tl.load(O + (b * o_b + h * o_h + l * o_l)[:, None] + dv[None, :], mask=mask, other=0.0)
        g = tl.load(G + (b * g_b + h * g_h + l * g_l)[:, None] + dv[None, :], mask=mask, other=0.0)
        delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + row, mask=live, other=0.0)
    tl.store(DELTA + row, delta, mask=live)


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
    Q, K, V, G, L, DELTA, DQ, B, DB, UNIT,
    COLS, KINDS, START, MID, END, ORDER, WORDS, ALIVE, GATHERED, Q_INDEX, KV_INDEX, KEY_RANGE,
    ROW_RANGE,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, dq_b, dq_h, dq_l, l_b, l_h,
    b_b, b_h, b_q, b_k, b_first, b_count, db_b, db_h, db_q, db_k,
    qi_b, qi_h, ki_b, ki_h, kr_b, kr_h, rr_b, rr_h,
    q_len, kv_len, q_rows, kv_rows, q_tiles, kv_tiles, groups_h, batches, packs, subs,
    scale, cap, slope,
    D: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr,
    Q_TILE: tl.constexpr, KV_TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    VECTOR: tl.constexpr, PACK: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr,
    FOLD: tl.constexpr, BIAS: tl.constexpr, BIAS_ROW: tl.constexpr, BIAS_COL: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr, VIRTUAL: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of one block of rows, and its part of the bias's gradient. `slope` is scale itself."""
    pid = tl.program_id(0)
    sub = pid % subs
    rest = pid // subs
    packs_in = packs // groups_h
    pack_in = rest % packs_in
    rest = rest // packs_in
    batch_in = rest % batches
    item = rest // batches
    if ORDER is not None:
        item = tl.load(ORDER + item)
    tile = item % q_tiles
    group = item // q_tiles
    group_h = group % groups_h
    group_b = group // groups_h
    batch = group_b + batch_in
    head0 = (group_h * packs_in + pack_in) * PACK
    kv_head = head0 // GROUP

    line = sub * M + tl.arange(0, M)
    head = head0 + line % PACK
    line = line // PACK
    row = tile * Q_TILE + line
    live = (line < Q_TILE) & (row < q_rows)
    query = row
    if Q_INDEX is not None:
        query = tl.load(Q_INDEX + group_b * qi_b + group_h * qi_h + row, mask=live, other=-1)
        live = live & (query >= 0)
    query = tl.where(live, query, -1)

    d = tl.arange(0, D1)
    dv = tl.arange(0, DV1)
    n = tl.arange(0, N)
    b64, h64, q64 = batch.to(tl.int64), head.to(tl.int64), query.to(tl.int64)
    q_mask = live[:, None] & (d < D)[None, :]
    v_mask = live[:, None] & (dv < DV)[None, :]
    q = tl.load(Q + (b64 * q_b + h64 * q_h + q64 * q_l)[:, None] + d[None, :], mask=q_mask, other=0.0)
    if G is not None:
        g = tl.load(
            G + (b64 * g_b + h64 * g_h + q64 * g_l)[:, None] + dv[None, :], mask=v_mask, other=0.0
        )
    l_at = b64 * l_b + h64 * l_h + q64
    lse = tl.load(L + l_at, mask=live, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    delta = tl.load(DELTA + l_at, mask=live, other=0.0)
    k_base = K + b64 * k_b + kv_head.to(tl.int64) * k_h
    v_base = V + b64 * v_b + kv_head.to(tl.int64) * v_h
    if BIAS > 0:
        b_head = b64 * b_b + head0.to(tl.int64) * b_h
        db_head = b64 * db_b + head0.to(tl.int64) * db_h
        shift = kv_len - q_len
    unit = 1.0
    if BIAS_GRADIENT > 1:
        unit = tl.load(UNIT)

    if COLS is None:
        start = 0
        mid = kv_rows // KV_TILE
        end = tl.cdiv(kv_rows, KV_TILE)
        if VECTOR:
            mid = 0
    else:
        start = tl.load(START + item)
        mid = tl.load(MID + item)
        end = tl.load(END + item)
    whole = 0
    if not VECTOR:
        whole = (mid - start).to(tl.int32) * (KV_TILE // N)
    others = (end - mid).to(tl.int32)
    steps = tl.cdiv(others * KV_TILE, N)
    acc = tl.zeros([M, D1], tl.float32)

    if not VECTOR and KV_INDEX is None:
        for step in tl.range(0, whole, num_stages=STAGES):
            if COLS is None:
                col = step // (KV_TILE // N)
            else:
                col = tl.load(COLS + start + step // (KV_TILE // N))
            key0 = col * KV_TILE + step % (KV_TILE // N) * N
            k_tile = k_base + key0.to(tl.int64) * k_l
            if D1 == D:
                k = tl.load(k_tile + n[:, None] * k_l + d[None, :])
            else:
                k = tl.load(k_tile + n[:, None] * k_l + d[None, :], mask=(d < D)[None, :], other=0.0)
            raw = dot(q, tl.trans(k), tl.zeros([M, N], tl.float32), PRECISION, WIDEN)
            scores, bent = bend_scores(raw, scale, cap, SOFTCAP, FOLD)
            if BIAS > 0:
                scores = add_bias(
                    scores, B, b_head, query[:, None], (key0 + n)[None, :], live[:, None], b_q, b_k,
                    b_first, b_count, shift, BIAS, BIAS_ROW, BIAS_COL,
                )  # fmt: skip
            if FOLD:
                p = tl.exp2(scores * scale - lse[:, None])
            else:
                p = tl.exp2(scores - lse[:, None])
            if G is None:
                ds = p * (0.0 - delta[:, None])
            else:
                v_tile = v_base + key0.to(tl.int64) * v_l
                if DV1 == DV:
                    v = tl.load(v_tile + n[:, None] * v_l + dv[None, :])
                else:
                    v = tl.load(
                        v_tile + n[:, None] * v_l + dv[None, :], mask=(dv < DV)[None, :], other=0.0
                    )
                dp = dot(g, tl.trans(v), tl.zeros([M, N], tl.float32), PRECISION, WIDEN)
                ds = p * (dp - delta[:, None])
            if BIAS_GRADIENT > 0:
                keep_bias_gradient(
                    DB, unit, ds, db_head, query[:, None], (key0 + n)[None, :],
                    live[:, None] & (n >= 0)[None, :], db_q, db_k, b_first, b_count, shift,
                    BIAS_GRADIENT, BIAS_ROW, BIAS_COL,
                )  # fmt: skip
            if SOFTCAP:
                ds = ds * (1.0 - bent * bent)
            acc = dot(ds.to(k.dtype), k, acc, PRECISION, WIDEN)

    if KEY_RANGE is not None:
        ranges = KEY_RANGE + group_b * kr_b + group_h * kr_h + row * 2
        low = tl.load(ranges, mask=live, other=2147483647)
        high = tl.load(ranges + 1, mask=live, other=0)
        least = tl.min(low, 0)
        most = tl.max(high, 0)
    for step in tl.range(0, steps, num_stages=STAGES):
        col, kind, within, first, there = list_slots(
            step, mid, others, COLS, KINDS, KV_TILE, N, VECTOR
        )
        place = col * KV_TILE + within
        if GATHERED is not None:
            single = col >= kv_tiles
            listed = tl.load(
                GATHERED + (col - kv_tiles).to(tl.int64) * KV_TILE + within, mask=single & there,
                other=-1,
            )  # fmt: skip
            place = tl.where(single, listed, place)
        there = there & (place >= 0) & (place < kv_rows)
        if WORDS is not None:
            there = there & any_bits(ALIVE, kind, first, KV_TILE, N, VECTOR)
        if KEY_RANGE is not None:
            there = there & in_range(place, kind, least, most, -1)
        if ROW_RANGE is not None:
            rows_of = ROW_RANGE + group_b * rr_b + group_h * rr_h + place * 2
            row_low = tl.load(rows_of, mask=there, other=0)
            row_high = tl.load(rows_of + 1, mask=there, other=0)
            there = there & ((kind != -2) | (row_low < row_high))
        key = place
        if KV_INDEX is not None:
            key = tl.load(KV_INDEX + group_b * ki_b + group_h * ki_h + place, mask=there, other=-1)
            there = there & (key >= 0)
        key = tl.where(there, key, -1)
        k_mask = there[:, None] & (d < D)[None, :]
        k = tl.load(k_base + (key.to(tl.int64) * k_l)[:, None] + d[None, :], mask=k_mask, other=0.0)
        raw = dot(q, tl.trans(k), tl.zeros([M, N], tl.float32), PRECISION, WIDEN)
        scores, bent = bend_scores(raw, scale, cap, SOFTCAP, FOLD)
        if BIAS > 0:
            scores = add_bias(
                scores, B, b_head, query[:, None], key[None, :], live[:, None] & there[None, :],
                b_q, b_k, b_first, b_count, shift, BIAS, BIAS_ROW, BIAS_COL,
            )  # fmt: skip
        seen = live[:, None] & there[None, :]
        if WORDS is not None:
            seen = seen & listed_bits(WORDS, kind, line, first, Q_TILE, KV_TILE, N, VECTOR)
        if KEY_RANGE is not None:
            wide = kind[None, :] if VECTOR else kind
            seen = seen & in_range(place[None, :], wide, low[:, None], high[:, None], -1)
        if ROW_RANGE is not None:
            wide = kind[None, :] if VECTOR else kind
            seen = seen & in_range(row[:, None], wide, row_low[None, :], row_high[None, :], -2)
        scores = tl.where(seen, scores, float("-inf"))
        if FOLD:
            p = tl.exp2(scores * scale - lse[:, None])
        else:
            p = tl.exp2(scores - lse[:, None])
        if G is None:
            ds = p * (0.0 - delta[:, None])
        else:
            v = tl.load(
                v_base + (key.to(tl.int64) * v_l)[:, None] + dv[None, :],
                mask=there[:, None] & (dv < DV)[None, :], other=0.0,
            )  # fmt: skip
            dp = dot(g, tl.trans(v), tl.zeros([M, N], tl.float32), PRECISION, WIDEN)
            ds = p * (dp - delta[:, None])
        if BIAS_GRADIENT > 0:
            keep_bias_gradient(
                DB, unit, ds, db_head, query[:, None], key[None, :], seen, db_q, db_k, b_first,
                b_count, shift, BIAS_GRADIENT, BIAS_ROW, BIAS_COL,
            )  # fmt: skip
        if SOFTCAP:
            ds = ds * (1.0 - bent * bent)
        acc = dot(ds.to(k.dtype), k, acc, PRECISION, WIDEN)

    to = query
    if VIRTUAL:
        to = row
    at = b64 * dq_b + h64 * dq_h + to.to(tl.int64) * dq_l
    tl.store(DQ + at[:, None] + d[None, :], (acc * slope).to(DQ.dtype.element_ty), mask=q_mask)


@triton.jit(do_not_specialize=VARYING)
def key_gradient(
    Q, K, V, G, L, DELTA, DK, DV, B,
    ROWS, KINDS, START, MID, END, ORDER, WORDS, GATHERED, Q_INDEX, KV_INDEX, KEY_RANGE, ROW_RANGE,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l,
    dk_b, dk_h, dk_l, dv_b, dv_h, dv_l, l_b, l_h,
    b_b, b_h, b_q, b_k, b_first, b_count,
    qi_b, qi_h, ki_b, ki_h, kr_b, kr_h, rr_b, rr_h,
    q_len, kv_len, q_rows, kv_rows, kv_tiles, width, groups_h, list_heads, list_size, heads_in,
    batches, subs,
    scale, cap, slope,
    D: tl.constexpr, D1: tl.constexpr, DVAL: tl.constexpr, DV1: tl.constexpr,
    Q_TILE: tl.constexpr, KV_TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    VECTOR: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, FOLD: tl.constexpr,
    BIAS: tl.constexpr, BIAS_ROW: tl.constexpr, BIAS_COL: tl.constexpr, DIRECT: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, over all query heads that share them.

    Axis 0 counts (visited tile, batch entry, key head, block of keys in the tile). Scores are
    transposed: keys are the rows. Without `DIRECT` the slots of each visited tile are put out by
    themselves, (tile, batch entry, key head, slot), for `add_slots`.
    """
    pid = tl.program_id(0)
    sub = pid % subs
    rest = pid // subs
    head_in = rest % heads_in
    rest = rest // heads_in
    batch_in = rest % batches
    number = rest // batches
    item = number
    if ORDER is not None:
        item = tl.load(ORDER + item)
    col = item % width
    group = item // width
    group_h = group % groups_h
    group_b = group // groups_h
    batch = group_b + batch_in
    kv_head = group_h + head_in

    line = sub * N + tl.arange(0, N)
    place = col * KV_TILE + line
    live = line < KV_TILE
    list_h = kv_head * GROUP // list_size
    if GATHERED is not None:
        single = col >= kv_tiles
        listed = tl.load(
            GATHERED + (col - kv_tiles).to(tl.int64) * KV_TILE + line, mask=single & live, other=-1
        )
        place = tl.where(single, listed, place)
    live = live & (place >= 0) & (place < kv_rows)
    if ROW_RANGE is not None:
        rows_of = ROW_RANGE + group_b * rr_b + list_h * rr_h + place * 2
        row_low = tl.load(rows_of, mask=live, other=0)
        row_high = tl.load(rows_of + 1, mask=live, other=0)
    key = place
    if KV_INDEX is not None:
        key = tl.load(KV_INDEX + group_b * ki_b + list_h * ki_h + place, mask=live, other=-1)
        live = live & (key >= 0)
    key = tl.where(live, key, -1)

    d = tl.arange(0, D1)
    dv = tl.arange(0, DV1)
    m = tl.arange(0, M)
    b64, h64, k64 = batch.to(tl.int64), kv_head.to(tl.int64), key.to(tl.int64)
    k_mask = live[:, None] & (d < D)[None, :]
    v_mask = live[:, None] & (dv < DVAL)[None, :]
    k = tl.load(K + b64 * k_b + h64 * k_h + (k64 * k_l)[:, None] + d[None, :], mask=k_mask, other=0.0)
    v = tl.load(V + b64 * v_b + h64 * v_h + (k64 * v_l)[:, None] + dv[None, :], mask=v_mask, other=0.0)
    dk_acc = tl.zeros([N, D1], tl.float32)
    dv_acc = tl.zeros([N, DV1], tl.float32)
    shift = kv_len - q_len

    for in_group in range(0, GROUP):
        head = kv_head * GROUP + in_group
        list_h = head // list_size
        if ROWS is None:
            start = 0
            mid = q_rows // Q_TILE
            end = tl.cdiv(q_rows, Q_TILE)
            if VECTOR:
                mid = 0
        else:
            owner = (group_b * list_heads + list_h) * width + col
            start = tl.load(START + owner)
            mid = tl.load(MID + owner)
            end = tl.load(END + owner)
        whole = 0
        if not VECTOR:
            whole = (mid - start).to(tl.int32) * (Q_TILE // M)
        others = (end - mid).to(tl.int32)
        steps = tl.cdiv(others * Q_TILE, M)
        hq64 = head.to(tl.int64)
        q_base = Q + b64 * q_b + hq64 * q_h
        l_base = L + b64 * l_b + hq64 * l_h
        delta_base = DELTA + b64 * l_b + hq64 * l_h
        b_head = b64 * b_b + hq64 * b_h

        if not VECTOR and Q_INDEX is None:
            for step in tl.range(0, whole, num_stages=STAGES):
                if ROWS is None:
                    tile = step // (Q_TILE // M)
                else:
                    tile = tl.load(ROWS + start + step // (Q_TILE // M))
                row0 = tile * Q_TILE + step % (Q_TILE // M) * M
                q_tile = q_base + row0.to(tl.int64) * q_l
                if D1 == D:
                    q = tl.load(q_tile + m[:, None] * q_l + d[None, :])
                else:
                    q = tl.load(
                        q_tile + m[:, None] * q_l + d[None, :], mask=(d < D)[None, :], other=0.0
                    )
                lse = tl.load(l_base + row0 + m)
                lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
                delta = tl.load(delta_base + row0 + m)
                raw = dot(k, tl.trans(q), tl.zeros([N, M], tl.float32), PRECISION, WIDEN)
                scores, bent = bend_scores(raw, scale, cap, SOFTCAP, FOLD)
                if BIAS > 0:
                    scores = add_bias(
                        scores, B, b_head, (row0 + m)[None, :], key[:, None],
                        live[:, None] & (m >= 0)[None, :], b_q, b_k, b_first, b_count, shift, BIAS,
                        BIAS_ROW, BIAS_COL,
                    )  # fmt: skip
                if FOLD:
                    p = tl.exp2(scores * scale - lse[None, :])
                else:
                    p = tl.exp2(scores - lse[None, :])
                if G is None:
                    ds = p * (0.0 - delta[None, :])
                else:
                    g_tile = G + b64 * g_b + hq64 * g_h + row0.to(tl.int64) * g_l
                    if DV1 == DVAL:
                        g = tl.load(g_tile + m[:, None] * g_l + dv[None, :])
                    else:
                        g = tl.load(
                            g_tile + m[:, None] * g_l + dv[None, :], mask=(dv < DVAL)[None, :],
                            other=0.0,
                        )  # fmt: skip
                    dv_acc = dot(p.to(g.dtype), g, dv_acc, PRECISION, WIDEN)
                    dp = dot(v, tl.trans(g), tl.zeros([N, M], tl.float32), PRECISION, WIDEN)
                    ds = p * (dp - delta[None, :])
                if SOFTCAP:
                    ds = ds * (1.0 - bent * bent)
                dk_acc = dot(ds.to(q.dtype), q, dk_acc, PRECISION, WIDEN)

        for step in tl.range(0, steps, num_stages=STAGES):
            tile, kind, within, first, there = list_slots(
                step, mid, others, ROWS, KINDS, Q_TILE, M, VECTOR
            )
            row = tile * Q_TILE + within
            there = there & (row < q_rows)
            query = row
            if Q_INDEX is not None:
                query = tl.load(
                    Q_INDEX + group_b * qi_b + list_h * qi_h + row, mask=there, other=-1
                )
                there = there & (query >= 0)
            query = tl.where(there, query, -1)
            q = tl.load(
                q_base + (query.to(tl.int64) * q_l)[:, None] + d[None, :],
                mask=there[:, None] & (d < D)[None, :], other=0.0,
            )  # fmt: skip
            lse = tl.load(l_base + query, mask=there, other=float("-inf"))
            lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
            delta = tl.load(delta_base + query, mask=there, other=0.0)
            raw = dot(k, tl.trans(q), tl.zeros([N, M], tl.float32), PRECISION, WIDEN)
            scores, bent = bend_scores(raw, scale, cap, SOFTCAP, FOLD)
            if BIAS > 0:
                scores = add_bias(
                    scores, B, b_head, query[None, :], key[:, None], live[:, None] & there[None, :],
                    b_q, b_k, b_first, b_count, shift, BIAS, BIAS_ROW, BIAS_COL,
                )  # fmt: skip
            seen = live[:, None] & there[None, :]
            if WORDS is not None:
                seen = seen & listed_bits(WORDS, kind, line, first, KV_TILE, Q_TILE, M, VECTOR)
            wide = kind[None, :] if VECTOR else kind
            if KEY_RANGE is not None:
                ranges = KEY_RANGE + group_b * kr_b + list_h * kr_h + row * 2
                low = tl.load(ranges, mask=there, other=0)
                high = tl.load(ranges + 1, mask=there, other=0)
                seen = seen & in_range(place[:, None], wide, low[None, :], high[None, :], -1)
            if ROW_RANGE is not None:
                seen = seen & in_range(row[None, :], wide, row_low[:, None], row_high[:, None], -2)
            scores = tl.where(seen, scores, float("-inf"))
            if FOLD:
                p = tl.exp2(scores * scale - lse[None, :])
            else:
                p = tl.exp2(scores - lse[None, :])
            if G is None:
                ds = p * (0.0 - delta[None, :])
            else:
                g = tl.load(
                    G + b64 * g_b + hq64 * g_h + (query.to(tl.int64) * g_l)[:, None] + dv[None, :],
                    mask=there[:, None] & (dv < DVAL)[None, :], other=0.0,
                )  # fmt: skip
                dv_acc = dot(p.to(g.dtype), g, dv_acc, PRECISION, WIDEN)
                dp = dot(v, tl.trans(g), tl.zeros([N, M], tl.float32), PRECISION, WIDEN)
                ds = tl.where(seen, p * (dp - delta[None, :]), 0.0)
            if SOFTCAP:
                ds = tl.where(seen, ds * (1.0 - bent * bent), 0.0)
            dk_acc = dot(ds.to(q.dtype), q, dk_acc, PRECISION, WIDEN)

    if DIRECT:
        dk_at = b64 * dk_b + h64 * dk_h + k64 * dk_l
        dv_at = b64 * dv_b + h64 * dv_h + k64 * dv_l
    else:
        slab = (number.to(tl.int64) * batches + batch_in) * heads_in + head_in
        dk_at = (slab * KV_TILE + line) * D
        dv_at = (slab * KV_TILE + line) * DVAL
    tl.store(DK + dk_at[:, None] + d[None, :], (dk_acc * slope).to(DK.dtype.element_ty), mask=k_mask)
    tl.store(DV + dv_at[:, None] + dv[None, :], dv_acc.to(DV.dtype.element_ty), mask=v_mask)


@triton.jit(do_not_specialize=["groups_h", "batches", "heads_in", "kv_len"])
def add_slots(
    PARTS, BEGIN, SLOTS, OUT, groups_h, batches, heads_in, kv_len, out_b, out_h, out_l,
    D: tl.constexpr, D1: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradient of one key: the sum, always in the same order, over the slots that hold it."""
    key = tl.program_id(0)
    which = tl.program_id(1)  # batch entry and key head
    heads = groups_h * heads_in
    batch, head = which // heads, which % heads
    group_h, head_in = head // heads_in, head % heads_in
    batch_in = batch % batches
    group = batch // batches * groups_h + group_h
    d = tl.arange(0, D1)
    owner = group.to(tl.int64) * kv_len + key
    begin, end = tl.load(BEGIN + owner), tl.load(BEGIN + owner + 1)
    acc = tl.zeros([D1], tl.float32)
    for start in range(begin, end, CHUNK):
        at = start + tl.arange(0, CHUNK)
        there = at < end
        slot = tl.load(SLOTS + at, mask=there, other=0)
        slab = (slot // TILE * batches + batch_in) * heads_in + head_in
        row = slab * TILE + slot % TILE
        mask = there[:, None] & (d < D)[None, :]
        acc += tl.sum(tl.load(PARTS + (row * D)[:, None] + d[None, :], mask=mask, other=0.0), 0)
    to = batch.to(tl.int64) * out_b + head.to(tl.int64) * out_h + key.to(tl.int64) * out_l
    tl.store(OUT + to + d, acc.to(OUT.dtype.element_ty), mask=d < D)
