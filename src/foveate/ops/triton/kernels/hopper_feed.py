"""What feeds the forward on Hopper: its memory, the blocks, and the warp that brings tiles.

See `hopper`, which computes with them.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def room(
    Q_TILES, K_TILES, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    """Shared memory of a block: its queries, keys and values, its number, and who is ready."""
    dtype: gl.constexpr = Q_TILES.dtype
    q_s = gl.allocate_shared_memory(dtype, [HALVES * BUFFERS, 1, 1, 64, D], Q_TILES.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, D], K_TILES.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, D], K_TILES.layout)
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [HALVES * BUFFERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [HALVES * BUFFERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(HALVES * BUFFERS):
        mbarrier.init(q_full.index(i), 1)
        mbarrier.init(q_empty.index(i), 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), 1)
        mbarrier.init(k_empty.index(i), HALVES)
        mbarrier.init(v_full.index(i), 1)
        mbarrier.init(v_empty.index(i), HALVES)
    for i in gl.static_range(2):
        mbarrier.init(told.index(i), 1)
        mbarrier.init(heard.index(i), HALVES)
    signs = (q_full, q_empty, k_full, k_empty, v_full, v_empty, told, heard)
    return (q_s, k_s, v_s, numbers), signs


@gluon.jit
def block_of(number, BLOCKS, sizes, Q_TILE: gl.constexpr, KV_TILE: gl.constexpr):
    """A block of rows as `Plan.blocks` has it, and the rest of its number; nothing waits.

    Returns (rest, first row, group of the batch, of the heads, where its list begins, first tile
    that isn't whole, end, first key that a row of it sees, end, the first tile).
    """
    count, giants, packs, programs, q_rows, kv_rows = sizes
    number = gl.minimum(number, programs - 1)
    # The giants of all heads first: see `plan.Order`.
    times = programs // count
    late = number >= giants * times
    width = gl.maximum(gl.where(late, count - giants, giants), 1)
    number -= gl.where(late, giants * times, 0)
    place = gl.where(late, giants, 0) + number % width
    rest = number // width
    if BLOCKS is None:
        zero = number * 0
        block = (
            rest, place * Q_TILE, zero, zero, zero, zero + kv_rows // KV_TILE,
            zero + gl.cdiv(kv_rows, KV_TILE), zero, zero + kv_rows, zero,
        )  # fmt: skip
    else:
        at = BLOCKS + place * 9
        block = (
            rest, gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3),
            gl.load(at + 4), gl.load(at + 5), gl.load(at + 6), gl.load(at + 7), gl.load(at + 8),
        )  # fmt: skip
    return block


@gluon.jit
def whose(rest, group_b, group_h, packs):
    """(batch entry, head) of a block."""
    return group_b + rest // packs, group_h * packs + rest % packs


@gluon.jit
def tile_at(step, last, COLS, KINDS, PER: gl.constexpr):
    """(tile, kind) of a step of a list; 0 from `last` on."""
    kind = step * 0
    if COLS is not None:
        kind = gl.load(KINDS + step // PER, mask=step < last, other=0)
    return only_tile(step, last, COLS, PER), kind


@gluon.jit
def only_tile(step, last, COLS, PER: gl.constexpr):
    """The tile alone."""
    col = step // PER
    if COLS is not None:
        col = gl.load(COLS + col, mask=step < last, other=0)
    return col


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
    part, memory, signs, Q_TILES, K_TILES, V_TILES, COLS, BLOCKS, NEXT, sizes, GROUP: gl.constexpr,
    Q_TILE: gl.constexpr, KV_TILE: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    BUFFERS: gl.constexpr, HALVES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """One warp: takes blocks; of each its queries, keys and values, as room comes free.

    It feeds block `part` of those that a program has at once. Keys are brought a step before
    values, as they are wanted.
    """
    PER: gl.constexpr = KV_TILE // N
    q_s, k_s, v_s, numbers = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty, told, heard = signs
    packs, programs = sizes[2], sizes[3]
    turn, k_done, v_done = 0, 0, 0
    number = part * gl.num_programs(0) + gl.program_id(0)
    tell(number, 0, numbers, told, heard)
    block = block_of(number, BLOCKS, sizes, Q_TILE, KV_TILE)
    col = block[9]
    while number < programs:
        number = PARTS * gl.num_programs(0) + gl.atomic_add(NEXT, 1, sem="relaxed")
        row0, first, last = block[1], block[4] * PER, block[6] * PER
        batch, head = whose(block[0], block[2], block[3], packs)
        kv_head = head // GROUP
        ahead = only_tile(first + 1, last, COLS, PER)
        for half in gl.static_range(HALVES):
            at = turn % BUFFERS * HALVES + half
            bring(
                Q_TILES, [batch, head, row0 + half * 64, 0], q_s.index(at), q_full.index(at),
                q_empty.index(at), (turn // BUFFERS & 1) ^ 1,
            )  # fmt: skip
        key0 = col * KV_TILE
        if first < last:
            at = k_done % STAGES
            bring(
                K_TILES, [batch, kv_head, key0, 0], k_s.index(at), k_full.index(at),
                k_empty.index(at), (k_done // STAGES & 1) ^ 1,
            )  # fmt: skip
            k_done += 1
        tell(number, turn + 1, numbers, told, heard)
        block = block_of(number, BLOCKS, sizes, Q_TILE, KV_TILE)
        for step in range(first + 1, last + 1):
            before = key0
            key0 = ahead * KV_TILE + step % PER * N
            ahead = only_tile(step + 1, last, COLS, PER)
            if step < last:
                at = k_done % STAGES
                bring(
                    K_TILES, [batch, kv_head, key0, 0], k_s.index(at), k_full.index(at),
                    k_empty.index(at), (k_done // STAGES & 1) ^ 1,
                )  # fmt: skip
                k_done += 1
            else:
                col = block[9]
            at = v_done % STAGES
            bring(
                V_TILES, [batch, kv_head, before, 0], v_s.index(at), v_full.index(at),
                v_empty.index(at), (v_done // STAGES & 1) ^ 1,
            )  # fmt: skip
            v_done += 1
        if first >= last:
            col = block[9]
        turn += 1
