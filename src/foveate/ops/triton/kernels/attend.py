"""The forward: online softmax over the tiles that a block of query rows visits.

m_i = max_j s_ij, l_i = sum_j exp2(s_ij - m_i), o_i = sum_j exp2(s_ij - m_i) v_j / l_i with scores in
units of log 2 (Dao 2023, arXiv:2307.08691, algorithm 1); lse_i = ln 2 (m_i + log2 l_i). Whole tiles
come first in each list and are taken without a mask; then those of which elements, or single keys,
count. The heads that share a key head are rows of one block (`PACK`), and a list may be cut into
`splits` parts, whose results are merged by their lse (Flash-Decoding).
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from foveate.ops.triton.kernels.tiles import (
    LN2,
    add_bias,
    any_bits,
    bend_scores,
    dot,
    in_range,
    list_slots,
    listed_bits,
)

VARYING = [
    "q_len", "kv_len", "q_rows", "kv_rows", "q_tiles", "kv_tiles", "groups_h", "batches", "packs",
    "subs", "splits", "b_first", "b_count", "o_s", "l_s", "l_b", "l_h", "qi_b", "qi_h", "ki_b",
    "ki_h", "kr_b", "kr_h", "rr_b", "rr_h",
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
    if FOLD:
        weights = tl.exp2(scores * scale - base[:, None])
    else:
        weights = tl.exp2(scores - base[:, None])
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
    q_len, kv_len, q_rows, kv_rows, q_tiles, kv_tiles, groups_h, batches, packs, subs, splits,
    scale, cap,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr,
    Q_TILE: tl.constexpr, KV_TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    VECTOR: tl.constexpr, PACK: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr,
    FOLD: tl.constexpr, BIAS: tl.constexpr, BIAS_ROW: tl.constexpr, BIAS_COL: tl.constexpr,
    SHARED: tl.constexpr, VIRTUAL: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One block of rows (program axis 0) and one part of its list (axis 1).

    Axis 0 counts (tile, batch entry, pack of heads, block of rows in the tile), the tiles with the
    longest lists first. `SHARED`: the values are the first DV elements of the keys. `VIRTUAL`: rows
    are put out where they stand in the tiles, to be merged where a query stands in several.
    """
    pid = tl.program_id(0)
    split = tl.program_id(1)
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
    batch = group_b + batch_in  # one of them is 0
    head0 = (group_h * packs_in + pack_in) * PACK
    kv_head = head0 // GROUP

    line = sub * M + tl.arange(0, M)
    head = head0 + line % PACK
    line = line // PACK
    row = tile * Q_TILE + line  # virtual
    live = (line < Q_TILE) & (row < q_rows)
    query = row
    if Q_INDEX is not None:
        query = tl.load(Q_INDEX + group_b * qi_b + group_h * qi_h + row, mask=live, other=-1)
        live = live & (query >= 0)
    query = tl.where(live, query, -1)

    d1 = tl.arange(0, D1)
    dv = tl.arange(0, DV1)
    q_rows_at = batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h + query.to(tl.int64) * q_l
    q1 = tl.load(
        Q + q_rows_at[:, None] + d1[None, :], mask=live[:, None] & (d1 < D)[None, :], other=0.0
    )
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2 if D2 > 0 else 16)
        q2 = tl.load(
            Q + q_rows_at[:, None] + d2[None, :], mask=live[:, None] & (d2 < D)[None, :], other=0.0
        )
    k_base = K + batch.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
    v_base = V + batch.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
    if BIAS > 0:
        if PACK > 1:
            b_head = (batch.to(tl.int64) * b_b + head.to(tl.int64) * b_h)[:, None]
        else:
            b_head = batch.to(tl.int64) * b_b + head0.to(tl.int64) * b_h
        shift = kv_len - q_len
    n = tl.arange(0, N)

    # The list: whole tiles from `start` on, the others from `mid` on; this program's part of both.
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
    steps = whole + tl.cdiv(others * KV_TILE, N)
    share = tl.cdiv(steps, splits)
    lo = split * share
    hi = tl.minimum(lo + share, steps)

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV1], tl.float32)

    if not VECTOR and KV_INDEX is None:
        for step in tl.range(lo, tl.minimum(hi, whole), num_stages=STAGES):
            if COLS is None:
                col = step // (KV_TILE // N)
            else:
                col = tl.load(COLS + start + step // (KV_TILE // N))
            key0 = col * KV_TILE + step % (KV_TILE // N) * N
            if K_TILES is not None:
                k_row = (batch * (k_b // k_l) + kv_head * (k_h // k_l) + key0).to(tl.int32)
                k1 = K_TILES.load([k_row, 0])
            else:
                k_tile = k_base + key0.to(tl.int64) * k_l
                k_at = n[:, None] * k_l
                if D1 <= D:
                    k1 = tl.load(k_tile + k_at + d1[None, :])
                else:
                    k1 = tl.load(k_tile + k_at + d1[None, :], mask=(d1 < D)[None, :], other=0.0)
            raw = dot(q1, tl.trans(k1), tl.zeros([M, N], tl.float32), PRECISION, WIDEN)
            if D2 > 0:
                k_tile = k_base + key0.to(tl.int64) * k_l
                if D1 + D2 == D:
                    k2 = tl.load(k_tile + n[:, None] * k_l + d2[None, :])
                else:
                    k2 = tl.load(
                        k_tile + n[:, None] * k_l + d2[None, :], mask=(d2 < D)[None, :], other=0.0
                    )
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
                v_row = (batch * (v_b // v_l) + kv_head * (v_h // v_l) + key0).to(tl.int32)
                v = V_TILES.load([v_row, 0])
            else:
                v_tile = v_base + key0.to(tl.int64) * v_l
                if DV1 == DV:
                    v = tl.load(v_tile + n[:, None] * v_l + dv[None, :])
                else:
                    v = tl.load(
                        v_tile + n[:, None] * v_l + dv[None, :], mask=(dv < DV)[None, :], other=0.0
                    )
            acc, total, top = update(
                acc, total, top, scores, v, scale, FOLD, BIAS > 0, PRECISION, WIDEN
            )

    if KEY_RANGE is not None:
        ranges = KEY_RANGE + group_b * kr_b + group_h * kr_h + row * 2
        low = tl.load(ranges, mask=live, other=2147483647)
        high = tl.load(ranges + 1, mask=live, other=0)
        least = tl.min(low, 0)
        most = tl.max(high, 0)
    for step in tl.range(tl.maximum(lo, whole) - whole, hi - whole, num_stages=STAGES):
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
        k_at = key.to(tl.int64) * k_l
        k1 = tl.load(
            k_base + k_at[:, None] + d1[None, :], mask=there[:, None] & (d1 < D)[None, :], other=0.0
        )
        raw = dot(q1, tl.trans(k1), tl.zeros([M, N], tl.float32), PRECISION, WIDEN)
        if D2 > 0:
            k2 = tl.load(
                k_base + k_at[:, None] + d2[None, :], mask=there[:, None] & (d2 < D)[None, :],
                other=0.0,
            )  # fmt: skip
            raw = dot(q2, tl.trans(k2), raw, PRECISION, WIDEN)
        scores, _ = bend_scores(raw, scale, cap, SOFTCAP, FOLD)
        if BIAS > 0:
            scores = add_bias(
                scores, B, b_head, query[:, None], key[None, :], live[:, None] & there[None, :],
                b_q, b_k, b_first, b_count, shift, BIAS, BIAS_ROW, BIAS_COL,
            )  # fmt: skip
        seen = there[None, :]
        if WORDS is not None:
            seen = seen & listed_bits(WORDS, kind, line, first, Q_TILE, KV_TILE, N, VECTOR)
        if KEY_RANGE is not None:
            wide = kind[None, :] if VECTOR else kind
            seen = seen & in_range(place[None, :], wide, low[:, None], high[:, None], -1)
        if ROW_RANGE is not None:
            wide = kind[None, :] if VECTOR else kind
            seen = seen & in_range(row[:, None], wide, row_low[None, :], row_high[None, :], -2)
        scores = tl.where(seen, scores, float("-inf"))
        if SHARED:
            v = k1
        else:
            v = tl.load(
                v_base + (key.to(tl.int64) * v_l)[:, None] + dv[None, :],
                mask=there[:, None] & (dv < DV)[None, :], other=0.0,
            )  # fmt: skip
        acc, total, top = update(acc, total, top, scores, v, scale, FOLD, True, PRECISION, WIDEN)

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    to = query
    if VIRTUAL:
        to = row
    to = to.to(tl.int64)
    o_at = split.to(tl.int64) * o_s + batch.to(tl.int64) * o_b + head.to(tl.int64) * o_h + to * o_l
    l_at = split.to(tl.int64) * l_s + batch.to(tl.int64) * l_b + head.to(tl.int64) * l_h + to
    tl.store(
        O + o_at[:, None] + dv[None, :],
        acc.to(O.dtype.element_ty),
        mask=live[:, None] & (dv < DV)[None, :],
    )
    tl.store(L + l_at, lse, mask=live)
