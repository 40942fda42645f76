"""The backward's second pass: dk and dv by the transpose of the lists; see `query_gradient`."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from foveate.ops.triton.kernels.programs import list_of
from foveate.ops.triton.kernels.query_gradient import VARYING
from foveate.ops.triton.kernels.tiles import (
    add_bias,
    bend_scores,
    copy_row,
    copy_tile,
    dot,
    exponentials,
    list_bounds,
    list_slots,
    load_rows,
    load_some,
    load_tile,
    next_kind,
    next_tile,
    one_of,
    or_none,
    range_of,
    seen_pairs,
)


@triton.jit(do_not_specialize=VARYING)
def key_gradient(
    Q, K, V, G, L, DELTA, DK, DV, B,
    Q_TILES, G_TILES, L_TILES, DELTA_TILES,
    ROWS, KINDS, START, MID, END, ORDER, WORDS, GATHERED, Q_INDEX, KV_INDEX, KEY_RANGE, ROW_RANGE,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l,
    dk_b, dk_h, dk_l, dv_b, dv_h, dv_l, l_b, l_h,
    b_b, b_h, b_q, b_k, b_first, b_count,
    qi_b, qi_h, ki_b, ki_h, kr_b, kr_h, rr_b, rr_h,
    q_len, kv_len, q_rows, kv_rows, kv_tiles, width, groups_h, list_heads, list_size, heads_in,
    batches, subs, visited, giants,
    scale, cap, slope,
    D: tl.constexpr, D1: tl.constexpr, DVAL: tl.constexpr, DV1: tl.constexpr,
    Q_TILE: tl.constexpr, KV_TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    VECTOR: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, FOLD: tl.constexpr,
    BIAS: tl.constexpr, BIAS_ROW: tl.constexpr, BIAS_COL: tl.constexpr, DIRECT: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Dk and dv of one block of keys, over all query heads that share them.

    Axis 0 counts (batch entry, key head, tile in ORDER, block of keys in the tile). Scores are
    transposed: keys are the rows. Without `DIRECT` the slots of each visited tile are put out by
    themselves, (tile, batch entry, key head, slot), for `add_slots`.
    """
    pid = tl.program_id(0)
    sub = pid % subs
    number, rest = list_of(pid // subs, giants, visited, heads_in * batches)
    head_in = rest % heads_in
    batch_in = rest // heads_in
    item = number
    if ORDER is not None:
        item = tl.load(ORDER + item)
    col = item % width
    group = item // width
    group_h = group % groups_h
    group_b = group // groups_h
    batch = group_b + batch_in  # one of them is 0, and so for the heads
    kv_head = group_h + head_in

    line = sub * N + tl.arange(0, N)
    place = col * KV_TILE + line
    live = line < KV_TILE
    list_h = kv_head * GROUP // list_size
    if GATHERED is not None:
        single = col >= kv_tiles
        listed = GATHERED + (col - kv_tiles).to(tl.int64) * KV_TILE + line
        place = one_of(single, tl.load(listed, mask=single & live, other=-1), place)
    live = live & (place >= 0) & (place < kv_rows)
    row_low, row_high = line, line
    if ROW_RANGE is not None:
        row_low, row_high = range_of(ROW_RANGE, group_b * rr_b + list_h * rr_h, place, live)
    key = place
    if KV_INDEX is not None:
        key = tl.load(KV_INDEX + group_b * ki_b + list_h * ki_h + place, mask=live, other=-1)
        live = live & (key >= 0)
    key = or_none(key, live)

    d = tl.arange(0, D1)
    dv = tl.arange(0, DV1)
    m = tl.arange(0, M)
    b64, h64, k64 = batch.to(tl.int64), kv_head.to(tl.int64), key.to(tl.int64)
    k = load_rows(K, b64 * k_b + h64 * k_h + k64 * k_l, d, live, D, D1)
    v = load_rows(V, b64 * v_b + h64 * v_h + k64 * v_l, dv, live, DVAL, DV1)
    dk_acc = tl.zeros([N, D1], tl.float32)
    dv_acc = tl.zeros([N, DV1], tl.float32)
    low, high = m, m
    shift = kv_len - q_len

    for in_group in range(0, GROUP):
        head = kv_head * GROUP + in_group
        list_h = head // list_size
        owner = (group_b * list_heads + list_h) * width + col
        start, mid, others, whole = list_bounds(
            ROWS, START, MID, END, owner, q_rows, Q_TILE, VECTOR
        )
        hq64 = head.to(tl.int64)
        q_base = Q + b64 * q_b + hq64 * q_h
        g_base = q_base
        if G is not None:
            g_base = G + b64 * g_b + hq64 * g_h
        l_base = L + b64 * l_b + hq64 * l_h
        delta_base = DELTA + b64 * l_b + hq64 * l_h
        b_head = b64 * b_b + hq64 * b_h

        if not VECTOR and Q_INDEX is None:
            whole_steps = whole * (Q_TILE // M)
            ahead = next_tile(0, whole_steps, ROWS, start, Q_TILE // M)
            for step in tl.range(0, whole_steps, num_stages=STAGES):
                row0 = ahead * Q_TILE + step % (Q_TILE // M) * M
                ahead = next_tile(step + 1, whole_steps, ROWS, start, Q_TILE // M)
                if Q_TILES is not None:
                    q = copy_tile(Q_TILES, batch, head, row0, M, D1)
                else:
                    q = load_tile(q_base, row0, q_l, m, d, D, D1)
                if L_TILES is not None:
                    lse = copy_row(L_TILES, batch, head, row0, M)[None, :]
                    delta = copy_row(DELTA_TILES, batch, head, row0, M)[None, :]
                else:
                    lse = tl.load(l_base + row0 + m)[None, :]
                    delta = tl.load(delta_base + row0 + m)[None, :]
                raw = dot(k, tl.trans(q), tl.zeros([N, M], tl.float32), PRECISION, WIDEN)
                scores, bent = bend_scores(raw, scale, cap, SOFTCAP, FOLD)
                if BIAS > 0:
                    scores = add_bias(
                        scores, B, b_head, (row0 + m)[None, :], key[:, None],
                        live[:, None] & (m >= 0)[None, :], b_q, b_k, b_first, b_count, shift, BIAS,
                        BIAS_ROW, BIAS_COL,
                    )  # fmt: skip
                ds = exponentials(scores, scale, lse, FOLD)
                if G is not None:
                    if G_TILES is not None:
                        g = copy_tile(G_TILES, batch, head, row0, M, DV1)
                    else:
                        g = load_tile(g_base, row0, g_l, m, dv, DVAL, DV1)
                    dv_acc = dot(ds.to(g.dtype), g, dv_acc, PRECISION, WIDEN)
                    dp = dot(v, tl.trans(g), tl.zeros([N, M], tl.float32), PRECISION, WIDEN)
                    ds = ds * (dp - delta)
                else:
                    ds = ds * (0.0 - delta)
                if SOFTCAP:
                    ds = ds * (1.0 - bent * bent)
                dk_acc = dot(ds.to(q.dtype), q, dk_acc, PRECISION, WIDEN)

        PLAIN: tl.constexpr = not VECTOR and Q_INDEX is None
        PER: tl.constexpr = max(1, Q_TILE // M)
        last = tl.cdiv(others * Q_TILE, M)
        if PLAIN:
            ahead, sort = next_kind(0, last, ROWS, KINDS, mid, PER)
        for step in tl.range(0, last, num_stages=STAGES):
            if PLAIN:
                first = step % PER * M
                row0, kind = ahead * Q_TILE + first, sort
                row = row0 + m
                there = row < q_rows
                ahead, sort = next_kind(step + 1, last, ROWS, KINDS, mid, PER)
            else:
                tile, kind, within, first, there = list_slots(
                    step, mid, others, ROWS, KINDS, Q_TILE, M, VECTOR
                )
                row = tile * Q_TILE + within
                there = there & (row < q_rows)
            query = row
            if Q_INDEX is not None:
                rows_at = Q_INDEX + group_b * qi_b + list_h * qi_h + row
                query = tl.load(rows_at, mask=there, other=-1)
                there = there & (query >= 0)
            query = or_none(query, there)
            if PLAIN and Q_TILES is not None:
                q = copy_tile(Q_TILES, batch, head, row0, M, D1)
            elif PLAIN:
                q = load_some(q_base, row0, q_l, m, d, there, D, D1)
            else:
                q = load_rows(q_base, query.to(tl.int64) * q_l, d, there, D, D1)
            if PLAIN and L_TILES is not None:
                lse = copy_row(L_TILES, batch, head, row0, M)[None, :]
                delta = copy_row(DELTA_TILES, batch, head, row0, M)[None, :]
            else:
                lse = tl.load(l_base + query, mask=there, other=float("inf"))[None, :]
                delta = tl.load(delta_base + query, mask=there, other=0.0)[None, :]
            raw = dot(k, tl.trans(q), tl.zeros([N, M], tl.float32), PRECISION, WIDEN)
            scores, bent = bend_scores(raw, scale, cap, SOFTCAP, FOLD)
            if BIAS > 0:
                scores = add_bias(
                    scores, B, b_head, query[None, :], key[:, None], live[:, None] & there[None, :],
                    b_q, b_k, b_first, b_count, shift, BIAS, BIAS_ROW, BIAS_COL,
                )  # fmt: skip
            if KEY_RANGE is not None:
                low, high = range_of(KEY_RANGE, group_b * kr_b + list_h * kr_h, row, there)
            seen = seen_pairs(
                there, WORDS, ROW_RANGE, KEY_RANGE, kind, line, first, place, row, row_low,
                row_high, low, high, q_rows, -2, KV_TILE, Q_TILE, M, VECTOR, PLAIN,
            )  # fmt: skip
            p = exponentials(tl.where(seen, scores, float("-inf")), scale, lse, FOLD)
            if G is not None:
                if PLAIN and G_TILES is not None:
                    g = copy_tile(G_TILES, batch, head, row0, M, DV1)
                elif PLAIN:
                    g = load_some(g_base, row0, g_l, m, dv, there, DVAL, DV1)
                else:
                    g = load_rows(g_base, query.to(tl.int64) * g_l, dv, there, DVAL, DV1)
                dv_acc = dot(p.to(g.dtype), g, dv_acc, PRECISION, WIDEN)
                dp = dot(v, tl.trans(g), tl.zeros([N, M], tl.float32), PRECISION, WIDEN)
                ds = p * (dp - delta)
            else:
                ds = p * (0.0 - delta)
            if SOFTCAP:
                ds = ds * (1.0 - bent * bent)
            # A key that nobody sees may hold anything: 0 times it must not count.
            dk_acc = dot(tl.where(p == 0.0, 0.0, ds).to(q.dtype), q, dk_acc, PRECISION, WIDEN)

    if DIRECT:
        dk_at = b64 * dk_b + h64 * dk_h + k64 * dk_l
        dv_at = b64 * dv_b + h64 * dv_h + k64 * dv_l
    else:
        slab = (number.to(tl.int64) * batches + batch_in) * heads_in + head_in
        dk_at = (slab * KV_TILE + line) * D
        dv_at = (slab * KV_TILE + line) * DVAL
    k_mask = live[:, None] & (d < D)[None, :]
    v_mask = live[:, None] & (dv < DVAL)[None, :]
    dk_acc = (dk_acc * slope).to(DK.dtype.element_ty)
    tl.store(DK + dk_at[:, None] + d[None, :], dk_acc, mask=k_mask)
    tl.store(DV + dv_at[:, None] + dv[None, :], dv_acc.to(DV.dtype.element_ty), mask=v_mask)


@triton.jit
def slot_sums(
    PARTS, OUT, which, key, live, begin, end, most, SLOTS, batches, heads_in, batch_in, head_in,
    kv_len, SIZE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One of the two gradients of some keys."""
    d = tl.arange(0, WIDTH)
    acc = tl.zeros([KEYS, WIDTH], tl.float32)
    for start in range(0, most, CHUNK):
        at = begin[:, None] + (start + tl.arange(0, CHUNK))[None, :]
        there = at < end[:, None]
        slot = tl.load(SLOTS + at, mask=there, other=0)
        row = ((slot // TILE * batches + batch_in) * heads_in + head_in) * TILE + slot % TILE
        mask = there[:, :, None] & (d < SIZE)[None, None, :]
        each = tl.load(PARTS + (row * SIZE)[:, :, None] + d[None, None, :], mask=mask, other=0.0)
        acc += tl.sum(each, 1)
    to = (which.to(tl.int64) * kv_len + key) * SIZE
    mask = live[:, None] & (d < SIZE)[None, :]
    tl.store(OUT + to[:, None] + d[None, :], acc.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["groups_h", "batches", "heads_in", "kv_len"])
def add_slots(
    DK_PARTS, DV_PARTS, BEGIN, SLOTS, DK, DV, groups_h, batches, heads_in, kv_len,
    D: tl.constexpr, D1: tl.constexpr, DVAL: tl.constexpr, DV1: tl.constexpr, TILE: tl.constexpr,
    KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradients of some keys: sums, always in the same order, over the slots that hold each.

    DK and DV are contiguous.
    """
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    live = key < kv_len
    which = tl.program_id(1)  # batch entry and key head
    heads = groups_h * heads_in
    batch, head = which // heads, which % heads
    group_h, head_in = head // heads_in, head % heads_in
    batch_in = batch % batches
    group = batch // batches * groups_h + group_h
    owner = group.to(tl.int64) * kv_len + key
    begin = tl.load(BEGIN + owner, mask=live, other=0)
    end = tl.load(BEGIN + owner + 1, mask=live, other=0)
    most = tl.max(end - begin, 0)
    slot_sums(
        DK_PARTS, DK, which, key, live, begin, end, most, SLOTS, batches, heads_in, batch_in,
        head_in, kv_len, D, D1, TILE, KEYS, CHUNK,
    )  # fmt: skip
    slot_sums(
        DV_PARTS, DV, which, key, live, begin, end, most, SLOTS, batches, heads_in, batch_in,
        head_in, kv_len, DVAL, DV1, TILE, KEYS, CHUNK,
    )  # fmt: skip
