"""The forward on Hopper, its warps specialised: one brings tiles, two groups of four compute.

The same sums as in `attend`, arranged as Shah et al. 2024 (arXiv:2407.08608) have them: a warp
keeps the copy engine filling stages of keys and values, and each of two groups of warps, with 64
rows of a block of 128, issues the scores of a step before it waits for the values of the step
before, so that the tensor cores work while it takes exponentials; the groups take turns in issuing.
Programs stay on the chip and take blocks, longest lists first, as they come free; which one comes
next is known a block ahead, so that its list, its ranges and its queries are there when it begins.

Layouts whose keys are runs and whose partial tiles are ranges, heads of 64 or 128 numbers of 16
bits. Written in Gluon, Triton's lower level.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

VARYING = [
    "kr_b", "kr_h", "br_b", "br_h", "l_b", "l_h", "subs", "packs", "groups_h", "batches", "q_tiles",
    "items", "programs", "q_rows", "kv_rows",
]  # fmt: skip


@gluon.jit
def block_of(
    number, ORDER, START, MID, END, sizes, Q_TILE: gl.constexpr, KV_TILE: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    """A block of 128 rows; they count as `tiles.row_program` counts programs. Past the last: none.

    Returns (first row, group of the batch, of the heads, batch entry, head, first step of its list,
    first one of a tile that isn't whole, end).
    """
    subs, packs, groups_h, batches, q_tiles, items, programs, kv_rows = sizes
    there = number < programs
    number = gl.minimum(number, programs - 1)
    sub = number % subs
    rest = number // subs
    place = rest % items
    rest = rest // items
    packs_in = packs // groups_h
    item = place
    if ORDER is not None:
        item = gl.load(ORDER + place, mask=there, other=0)
    group = item // q_tiles
    group_h = group % groups_h
    group_b = group // groups_h
    batch = group_b + rest // packs_in  # one of them is 0
    head = group_h * packs_in + rest % packs_in
    PER: gl.constexpr = KV_TILE // N
    if START is None:
        first = kv_rows * 0
        whole = kv_rows // KV_TILE * PER
        last = gl.cdiv(kv_rows, KV_TILE) * PER
    else:
        first = gl.load(START + place, mask=there, other=0).to(gl.int32) * PER
        whole = gl.load(MID + place, mask=there, other=0).to(gl.int32) * PER
        last = gl.load(END + place, mask=there, other=0).to(gl.int32) * PER
    row0 = item % q_tiles * Q_TILE + sub * 128
    return row0, group_b, group_h, batch, head, first, whole, last


@gluon.jit
def tile_at(step, last, COLS, KINDS, PER: gl.constexpr):
    """(tile, kind) of a step of a list; 0 from `last` on."""
    col = step // PER
    kind = step * 0
    if COLS is not None:
        kind = gl.load(KINDS + col, mask=step < last, other=0)
        col = gl.load(COLS + col, mask=step < last, other=0)
    return col, kind


@gluon.jit
def tell(number, turn, numbers, told, heard):
    """Say which block comes in a turn."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    at = turn % 2
    mbarrier.wait(heard.index(at), (turn // 2 & 1) ^ 1)
    numbers.index(at).store(gl.full([1], number, gl.int32, LAYOUT))
    mbarrier.arrive(told.index(at))


@gluon.jit
def hear(turn, numbers, told, heard):
    """Which block comes in a turn."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = turn % 2
    mbarrier.wait(told.index(at), turn // 2 & 1)
    number = gl.max(numbers.index(at).load(LAYOUT), 0)
    mbarrier.arrive(heard.index(at))
    return number


@gluon.jit
def bring(TILES, where, memory, full, empty, phase):
    """A tile by the copy engine, once its room is free."""
    mbarrier.wait(empty, phase)
    mbarrier.expect(full, TILES.block_type.nbytes)
    tma.async_copy_global_to_shared(TILES, where, full, memory)


@gluon.jit
def produce(
    Q_TILES, K_TILES, V_TILES, q_s, k_s, v_s, numbers, q_full, q_empty, k_full, k_empty, v_full,
    v_empty, told, heard, COLS, ORDER, START, MID, END, NEXT, sizes, GROUP: gl.constexpr,
    Q_TILE: gl.constexpr, KV_TILE: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: takes blocks; of each its queries, keys and values, as room comes free.

    Keys are brought a step before values, as they are wanted.
    """
    PER: gl.constexpr = KV_TILE // N
    programs = sizes[6]
    number = gl.program_id(0)
    turn, k_done, v_done = 0, 0, 0
    tell(number, 0, numbers, told, heard)
    while number < programs:
        row0, _, _, batch, head, first, _, last = block_of(
            number, ORDER, START, MID, END, sizes, Q_TILE, KV_TILE, N
        )
        number = gl.num_programs(0) + gl.atomic_add(NEXT, 1, sem="relaxed")
        tell(number, turn + 1, numbers, told, heard)
        kv_head = head // GROUP
        col, _ = tile_at(first, last, COLS, COLS, PER)
        ahead, _ = tile_at(first + 1, last, COLS, COLS, PER)
        for half in gl.static_range(2):
            at = turn % 2 * 2 + half
            bring(
                Q_TILES, [batch, head, row0 + half * 64, 0], q_s.index(at), q_full.index(at),
                q_empty.index(at), (turn // 2 & 1) ^ 1,
            )  # fmt: skip
        key0 = col * KV_TILE + first % PER * N
        if first < last:
            at = k_done % STAGES
            bring(
                K_TILES, [batch, kv_head, key0, 0], k_s.index(at), k_full.index(at),
                k_empty.index(at), (k_done // STAGES & 1) ^ 1,
            )  # fmt: skip
            k_done += 1
        for step in range(first + 1, last + 1):
            before = key0
            key0 = ahead * KV_TILE + step % PER * N
            ahead, _ = tile_at(step + 1, last, COLS, COLS, PER)
            if step < last:
                at = k_done % STAGES
                bring(
                    K_TILES, [batch, kv_head, key0, 0], k_s.index(at), k_full.index(at),
                    k_empty.index(at), (k_done // STAGES & 1) ^ 1,
                )  # fmt: skip
                k_done += 1
            at = v_done % STAGES
            bring(
                V_TILES, [batch, kv_head, before, 0], v_s.index(at), v_full.index(at),
                v_empty.index(at), (v_done // STAGES & 1) ^ 1,
            )  # fmt: skip
            v_done += 1
        turn += 1


@gluon.jit
def soften(scores, top, total, scale):
    """One step of the online softmax: (weights, factor on what was before, maximum, sum)."""
    new = gl.maximum(top, gl.max(scores, 1) * scale)
    base = gl.where(new == float("-inf"), 0.0, new)
    weights = gl.exp2(scores * scale - base[:, None])
    keep = gl.exp2(top - base)
    return weights, keep, new, total * keep + gl.sum(weights, 1)


@gluon.jit
def hide(scores, key0, kind, low, high, limit, N: gl.constexpr):
    """Scores of a tile that isn't whole: -inf outside of each row's range, and from `limit` on."""
    S_LAYOUT: gl.constexpr = scores.type.layout
    n = key0 + gl.arange(0, N, layout=gl.SliceLayout(0, S_LAYOUT))
    begin = gl.where(kind == -1, low, 0)
    end = gl.where(kind == -1, high, limit)
    seen = (n[None, :] >= begin[:, None]) & (n[None, :] < end[:, None])
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def clear(v, key0, least, most, N: gl.constexpr, D: gl.constexpr):
    """Make values of keys that no row of the block sees 0: they may hold NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    n = key0 + gl.arange(0, N, layout=gl.SliceLayout(1, LAYOUT))
    found = v.load(LAYOUT)
    v.store(gl.where(((n >= least) & (n < most))[:, None], found, 0.0))
    fence_async_shared()


@gluon.jit
def ranges_of(
    row0, row, group_b, group_h, KEY_RANGE, BLOCK_RANGE, range_steps, q_rows, kv_rows
):  # fmt: skip
    """What each row sees as one range, and the block as a whole: (low, high, least, most)."""
    low, high = row, row
    least, most = row0 * 0, kv_rows
    if KEY_RANGE is not None:
        kr_b, kr_h, br_b, br_h = range_steps
        live = row < q_rows
        table = KEY_RANGE + group_b * kr_b + group_h * kr_h
        low = gl.maximum(gl.load(table + row * 2, mask=live, other=0), 0)
        high = gl.minimum(gl.load(table + row * 2 + 1, mask=live, other=0), kv_rows)
        block = BLOCK_RANGE + group_b * br_b + group_h * br_h + row0 // 128 * 2
        least = gl.load(block)
        most = gl.load(block + 1)
    return low, high, least, most


@gluon.jit
def wait_turn(go, half, issues):
    """Wait until the other group has issued its products; the first group begins."""
    mbarrier.wait(go.index(half), (issues & 1) ^ (1 - half))


@gluon.jit
def consume(
    half, O, L, q_s, k_s, v_s, numbers, q_full, q_empty, k_full, k_empty, v_full, v_empty, told,
    heard, go, COLS, KINDS, ORDER, START, MID, END, KEY_RANGE, BLOCK_RANGE, range_steps, steps,
    sizes, q_rows, scale, Q_TILE: gl.constexpr, KV_TILE: gl.constexpr, N: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 rows of each block, the first or second half of it."""
    PER: gl.constexpr = KV_TILE // N
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    o_b, o_h, o_l, l_b, l_h = steps
    programs, kv_rows = sizes[6], sizes[7]
    line = half * 64 + gl.arange(0, 64, layout=S_ROWS)
    turn, done, issues = 0, 0, 0
    number = hear(0, numbers, told, heard)
    row0, group_b, group_h, batch, head, first, whole, last = block_of(
        number, ORDER, START, MID, END, sizes, Q_TILE, KV_TILE, N
    )
    low, high, least, most = ranges_of(
        row0, row0 + line, group_b, group_h, KEY_RANGE, BLOCK_RANGE, range_steps, q_rows, kv_rows
    )
    while number < programs:
        # What comes next is read now, and waited for when it is there.
        number = hear(turn + 1, numbers, told, heard)
        row1, group_b, group_h, batch1, head1, first1, whole1, last1 = block_of(
            number, ORDER, START, MID, END, sizes, Q_TILE, KV_TILE, N
        )
        low1, high1, least1, most1 = ranges_of(
            row1, row1 + line, group_b, group_h, KEY_RANGE, BLOCK_RANGE, range_steps, q_rows,
            kv_rows,
        )  # fmt: skip
        top = gl.full([64], float("-inf"), gl.float32, S_ROWS)
        total = gl.zeros([64], gl.float32, S_ROWS)
        acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
        zero = gl.zeros([64, N], gl.float32, S_LAYOUT)

        q_at = turn % 2 * 2 + half
        q = q_s.index(q_at)
        col, kind = tile_at(first, last, COLS, KINDS, PER)
        mbarrier.wait(q_full.index(q_at), turn // 2 & 1)
        if first < last:
            at, phase = done % STAGES, done // STAGES & 1
            mbarrier.wait(k_full.index(at), phase)
            if TURNS:
                wait_turn(go, half, issues)
            scores = warpgroup_mma(
                q, k_s.index(at).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            if TURNS:
                mbarrier.arrive(go.index(1 - half))
                issues += 1
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(at))
            key0 = col * KV_TILE + first % PER * N
            ragged = first >= whole
            sort = kind
            if ragged:
                scores = hide(scores, key0, sort, low, high, kv_rows, N)
            col, kind = tile_at(first + 1, last, COLS, KINDS, PER)
            weights, _, top, total = soften(scores, top, total, scale)
            p = gl.convert_layout(weights.to(q_s.dtype), P_LAYOUT)
            for step in range(first + 1, last):
                mbarrier.wait(v_full.index(at), phase)
                if ragged & (sort == -1) & ((key0 < least) | (key0 + N > most)):
                    clear(v_s.index(at), key0, least, most, N, D)
                done += 1
                k_at, k_phase = done % STAGES, done // STAGES & 1
                mbarrier.wait(k_full.index(k_at), k_phase)
                if TURNS:
                    wait_turn(go, half, issues)
                keys = k_s.index(k_at).permute((1, 0))
                scores = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
                sums = warpgroup_mma(p, v_s.index(at), acc, is_async=True)
                if TURNS:
                    mbarrier.arrive(go.index(1 - half))
                    issues += 1
                scores = warpgroup_mma_wait(1, deps=[scores])
                mbarrier.arrive(k_empty.index(k_at))
                key0 = col * KV_TILE + step % PER * N
                ragged = step >= whole
                sort = kind
                if ragged:
                    scores = hide(scores, key0, sort, low, high, kv_rows, N)
                col, kind = tile_at(step + 1, last, COLS, KINDS, PER)
                weights, keep, top, total = soften(scores, top, total, scale)
                acc, p = warpgroup_mma_wait(0, deps=[sums, p])
                mbarrier.arrive(v_empty.index(at))
                acc = acc * gl.convert_layout(keep, O_ROWS)[:, None]
                p = gl.convert_layout(weights.to(q_s.dtype), P_LAYOUT)
                at, phase = k_at, k_phase
            mbarrier.arrive(q_empty.index(q_at))
            mbarrier.wait(v_full.index(at), phase)
            if ragged & (sort == -1) & ((key0 < least) | (key0 + N > most)):
                clear(v_s.index(at), key0, least, most, N, D)
            acc = warpgroup_mma(p, v_s.index(at), acc)
            mbarrier.arrive(v_empty.index(at))
            done += 1
        else:
            mbarrier.arrive(q_empty.index(q_at))

        empty = total == 0.0
        safe = gl.where(empty, 1.0, total)
        lse = gl.where(empty, float("-inf"), (top + gl.log2(safe)) * 0.6931471805599453)
        acc = acc * gl.convert_layout(1.0 / safe, O_ROWS)[:, None]
        b64, h64 = batch.to(gl.int64), head.to(gl.int64)
        row = row0 + line
        gl.store(L + b64 * l_b + h64 * l_h + row, lse, mask=row < q_rows)
        to = row0 + half * 64 + gl.arange(0, 64, layout=O_ROWS)
        d = gl.arange(0, D, layout=gl.SliceLayout(0, O_LAYOUT))
        o_at = b64 * o_b + h64 * o_h + to.to(gl.int64) * o_l
        gl.store(O + o_at[:, None] + d[None, :], acc.to(q_s.dtype), mask=(to < q_rows)[:, None])
        row0, batch, head, first, whole, last = row1, batch1, head1, first1, whole1, last1
        low, high, least, most = low1, high1, least1, most1
        turn += 1


@gluon.jit(do_not_specialize=VARYING)
def attend_hopper(
    Q_TILES, K_TILES, V_TILES, O, L, COLS, KINDS, ORDER, START, MID, END, KEY_RANGE, BLOCK_RANGE,
    NEXT, kr_b, kr_h, br_b, br_h, o_b, o_h, o_l, l_b, l_h,
    subs, packs, groups_h, batches, q_tiles, items, programs, q_rows, kv_rows, scale,
    GROUP: gl.constexpr, Q_TILE: gl.constexpr, KV_TILE: gl.constexpr, N: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Blocks of 128 rows, one after another on each multiprocessor.

    Q_TILES, K_TILES, V_TILES: descriptors of (1, 1, 64, D) and (1, 1, N, D). BLOCK_RANGE: first and
    end of what the rows of each block see. NEXT: 0. `scale` is in units of log 2. With `TURNS` the
    groups of warps issue products in turn. The rest is as in `attend`.
    """
    dtype: gl.constexpr = Q_TILES.dtype
    q_s = gl.allocate_shared_memory(dtype, [4, 1, 1, 64, D], Q_TILES.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, D], K_TILES.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, D], V_TILES.layout)
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    go = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(q_full.index(i), 1)
        mbarrier.init(q_empty.index(i), 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), 1)
        mbarrier.init(k_empty.index(i), 2)
        mbarrier.init(v_full.index(i), 1)
        mbarrier.init(v_empty.index(i), 2)
    for i in gl.static_range(2):
        mbarrier.init(told.index(i), 1)
        mbarrier.init(heard.index(i), 2)
        mbarrier.init(go.index(i), 1)
    # The same memory as matrices, which is what the tensor cores want.
    FLAT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_m = q_s._reinterpret(dtype, [4, 64, D], FLAT)
    k_m = k_s._reinterpret(dtype, [STAGES, N, D], FLAT)
    v_m = v_s._reinterpret(dtype, [STAGES, N, D], FLAT)
    sizes = (subs, packs, groups_h, batches, q_tiles, items, programs, kv_rows)
    steps = (o_b, o_h, o_l, l_b, l_h)
    range_steps = (kr_b, kr_h, br_b, br_h)
    gl.warp_specialize(
        [
            (consume, (
                0, O, L, q_m, k_m, v_m, numbers, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                told, heard, go, COLS, KINDS, ORDER, START, MID, END, KEY_RANGE, BLOCK_RANGE,
                range_steps, steps, sizes, q_rows, scale, Q_TILE, KV_TILE, N, D, STAGES, TURNS,
            )),
            (consume, (
                1, O, L, q_m, k_m, v_m, numbers, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                told, heard, go, COLS, KINDS, ORDER, START, MID, END, KEY_RANGE, BLOCK_RANGE,
                range_steps, steps, sizes, q_rows, scale, Q_TILE, KV_TILE, N, D, STAGES, TURNS,
            )),
            (produce, (
                Q_TILES, K_TILES, V_TILES, q_s, k_s, v_s, numbers, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, told, heard, COLS, ORDER, START, MID, END, NEXT, sizes, GROUP,
                Q_TILE, KV_TILE, N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
