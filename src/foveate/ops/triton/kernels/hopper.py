"""The forward on Hopper, its warps specialised: one brings tiles, groups of four compute.

The same sums as in `attend`, arranged as Shah et al. 2024 (arXiv:2407.08608) have them: a warp
keeps the copy engine filling stages of keys and values, and each of two groups of warps, with 64
rows of a block of 128, issues the scores of a step before it waits for the values of the step
before, so that the tensor cores work while it takes exponentials. Or blocks have 64 rows and one
such group, and two programs share a multiprocessor; or one program has three such groups with a
block each, since at head size 64 the exponentials take as long as the products. Programs stay on
the chip and take blocks, longest lists first, as they come free; which one comes next is known a
block ahead, so that its list and its ranges are there when it begins.

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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foveate.ops.triton.kernels.hopper_feed import block_of, hear, produce, room, tile_at, whose

VARYING = [
    "kr_b", "kr_h", "l_b", "l_h", "count", "giants", "packs", "programs", "q_rows", "kv_rows",
]  # fmt: skip


@gluon.jit
def soften(scores, top, total, scale):
    """One step of the online softmax: (weights, factor on what was before, maximum, sum)."""
    new = gl.maximum(top, gl.max(scores, 1) * scale)
    base = gl.where(new == float("-inf"), 0.0, new)
    weights = gl.exp2(scores * scale - base[:, None])
    keep = gl.exp2(top - base)
    return weights, keep, new, total * keep + gl.sum(weights, 1)


@gluon.jit
def hide(scores, key0, kind, low, size, limit, N: gl.constexpr):
    """Scores of a tile that isn't whole: -inf outside of each row's range, and from `limit` on.

    One comparison for an element: below the range the difference is large. `begin` passes through
    an instruction of its own, so that the compiler doesn't keep all of n - low through all steps.
    """
    S_LAYOUT: gl.constexpr = scores.type.layout
    n = key0 + gl.arange(0, N, layout=gl.SliceLayout(0, S_LAYOUT))
    begin = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.where(kind == -1, low, 0)], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip
    width = gl.where(kind == -1, size, limit).to(gl.uint32, bitcast=True)
    place = (n[None, :] - begin[:, None]).to(gl.uint32, bitcast=True)
    return gl.where(place < width[:, None], scores, float("-inf"))


@gluon.jit
def clear(v, key0, least, most, N: gl.constexpr, D: gl.constexpr):
    """Make values of keys that no row of the block sees 0: they may hold NaN.

    Where two groups of warps share them, both write, and both the same.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    n = key0 + gl.arange(0, N, layout=gl.SliceLayout(1, LAYOUT))
    found = v.load(LAYOUT)
    v.store(gl.where(((n >= least) & (n < most))[:, None], found, 0.0))
    fence_async_shared()


@gluon.jit
def edges_of(
    block, line, COLS, KINDS, KEY_RANGE, range_steps, q_rows, PER: gl.constexpr
):  # fmt: skip
    """What a block begins with: the range of each row, the first tile, its kind; nothing waits."""
    low, high = line, line
    if KEY_RANGE is not None:
        row = block[1] + line
        table = KEY_RANGE + block[2] * range_steps[0] + block[3] * range_steps[1] + row * 2
        low = gl.load(table, mask=row < q_rows, other=0)
        high = gl.load(table + 1, mask=row < q_rows, other=0)
    col, kind = tile_at(block[4] * PER, block[6] * PER, COLS, KINDS, PER)
    return low, high, col, kind


@gluon.jit
def consume(
    half, memory, signs, O, L, COLS, KINDS, BLOCKS, KEY_RANGE, range_steps, steps, sizes, scale,
    Q_TILE: gl.constexpr, KV_TILE: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, BUFFERS: gl.constexpr, HALVES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 rows of each block, all of it or its first or second half."""
    PER: gl.constexpr = KV_TILE // N
    # Room for the next queries is free once the last scores are there. Saying so then gains up to
    # 5% with one group of warps; elsewhere the loop that has to ask is slower.
    EARLY: gl.constexpr = HALVES == 1 and PARTS == 1
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    # The same memory as matrices, which is what the tensor cores want.
    FLAT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = memory[0].dtype
    q_s = memory[0]._reinterpret(dtype, [HALVES * BUFFERS, 64, D], FLAT)
    k_s = memory[1]._reinterpret(dtype, [STAGES, N, D], FLAT)
    v_s = memory[2]._reinterpret(dtype, [STAGES, N, D], FLAT)
    numbers = memory[3]
    q_full, q_empty, k_full, k_empty, v_full, v_empty, told, heard = signs
    o_b, o_h, o_l, l_b, l_h = steps
    _, _, packs, programs, q_rows, kv_rows = sizes
    line = half * 64 + gl.arange(0, 64, layout=S_ROWS)
    turn, done = 0, 0
    number = hear(0, numbers, told, heard)
    block = block_of(number, BLOCKS, sizes, Q_TILE, KV_TILE)
    low, high, col, kind = edges_of(block, line, COLS, KINDS, KEY_RANGE, range_steps, q_rows, PER)
    while number < programs:
        rest, row0, group_b, group_h = block[0], block[1], block[2], block[3]
        first, whole, last = block[4] * PER, block[5] * PER, block[6] * PER
        least, most = block[7], block[8]
        low = gl.maximum(low, 0)
        size = gl.maximum(gl.minimum(high, kv_rows) - low, 0)
        top = gl.full([64], float("-inf"), gl.float32, S_ROWS)
        total = gl.zeros([64], gl.float32, S_ROWS)
        acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
        zero = gl.zeros([64, N], gl.float32, S_LAYOUT)
        q_at = turn % BUFFERS * HALVES + half
        q = q_s.index(q_at)
        mbarrier.wait(q_full.index(q_at), turn // BUFFERS & 1)
        if first < last:
            at, phase = done % STAGES, done // STAGES & 1
            mbarrier.wait(k_full.index(at), phase)
            keys = k_s.index(at).permute((1, 0))
            scores = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
            number = hear(turn + 1, numbers, told, heard)
            block = block_of(number, BLOCKS, sizes, Q_TILE, KV_TILE)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(at))
            if EARLY:  # noqa: SIM102
                if first + 1 == last:
                    mbarrier.arrive(q_empty.index(q_at))
            key0 = col * KV_TILE
            ragged = first >= whole
            sort = kind
            if ragged:
                scores = hide(scores, key0, sort, low, size, kv_rows, N)
            col, kind = tile_at(first + 1, last, COLS, KINDS, PER)
            weights, keep, top, total = soften(scores, top, total, scale)
            p = gl.convert_layout(weights.to(q_s.dtype), P_LAYOUT)
            for step in range(first + 1, last):
                mbarrier.wait(v_full.index(at), phase)
                if ragged & (sort == -1) & ((key0 < least) | (key0 + N > most)):
                    clear(v_s.index(at), key0, least, most, N, D)
                done += 1
                k_at, k_phase = done % STAGES, done // STAGES & 1
                mbarrier.wait(k_full.index(k_at), k_phase)
                keys = k_s.index(k_at).permute((1, 0))
                scores = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
                sums = warpgroup_mma(p, v_s.index(at), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=[scores])
                mbarrier.arrive(k_empty.index(k_at))
                if EARLY:  # noqa: SIM102
                    if step + 1 == last:
                        mbarrier.arrive(q_empty.index(q_at))
                key0 = col * KV_TILE + step % PER * N
                ragged = step >= whole
                sort = kind
                if ragged:
                    scores = hide(scores, key0, sort, low, size, kv_rows, N)
                col, kind = tile_at(step + 1, last, COLS, KINDS, PER)
                weights, keep, top, total = soften(scores, top, total, scale)
                acc, p = warpgroup_mma_wait(0, deps=[sums, p])
                mbarrier.arrive(v_empty.index(at))
                acc = acc * gl.convert_layout(keep, O_ROWS)[:, None]
                p = gl.convert_layout(weights.to(q_s.dtype), P_LAYOUT)
                at, phase = k_at, k_phase
            if not EARLY:
                mbarrier.arrive(q_empty.index(q_at))
            mbarrier.wait(v_full.index(at), phase)
            if ragged & (sort == -1) & ((key0 < least) | (key0 + N > most)):
                clear(v_s.index(at), key0, least, most, N, D)
            sums = warpgroup_mma(p, v_s.index(at), acc, is_async=True)
            low, high, col, kind = edges_of(
                block, line, COLS, KINDS, KEY_RANGE, range_steps, q_rows, PER
            )
            acc, p = warpgroup_mma_wait(0, deps=[sums, p])
            mbarrier.arrive(v_empty.index(at))
            done += 1
        else:
            mbarrier.arrive(q_empty.index(q_at))
            number = hear(turn + 1, numbers, told, heard)
            block = block_of(number, BLOCKS, sizes, Q_TILE, KV_TILE)
            low, high, col, kind = edges_of(
                block, line, COLS, KINDS, KEY_RANGE, range_steps, q_rows, PER
            )

        empty = total == 0.0
        safe = gl.where(empty, 1.0, total)
        lse = gl.where(empty, float("-inf"), (top + gl.log2(safe)) * 0.6931471805599453)
        acc = acc * gl.convert_layout(1.0 / safe, O_ROWS)[:, None]
        batch, head = whose(rest, group_b, group_h, packs)
        b64, h64 = batch.to(gl.int64), head.to(gl.int64)
        row = row0 + line
        gl.store(L + b64 * l_b + h64 * l_h + row, lse, mask=row < q_rows)
        to = row0 + half * 64 + gl.arange(0, 64, layout=O_ROWS)
        d = gl.arange(0, D, layout=gl.SliceLayout(0, O_LAYOUT))
        rows = O + (b64 * o_b + h64 * o_h + row0.to(gl.int64) * o_l)
        o_at = (to - row0)[:, None] * o_l + d[None, :]
        gl.store(rows + o_at, acc.to(q_s.dtype), mask=(to < q_rows)[:, None])
        turn += 1


@gluon.jit(do_not_specialize=VARYING)
def attend_hopper(
    Q_TILES, K_TILES, V_TILES, O, L, COLS, KINDS, BLOCKS, KEY_RANGE, NEXT,
    kr_b, kr_h, o_b, o_h, o_l, l_b, l_h, count, giants, packs, programs, q_rows, kv_rows, scale,
    GROUP: gl.constexpr, Q_TILE: gl.constexpr, KV_TILE: gl.constexpr, N: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, HALVES: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    """Blocks of 64 or 128 rows (`HALVES` is 1 or 2), one after another by each program.

    Or three of 64 rows at once (`PARTS` is 3), each with its own groups of warps and its own tiles.
    Q_TILES, K_TILES, V_TILES: descriptors of (1, 1, 64, D) and (1, 1, N, D). BLOCKS: (count, 9),
    None without lists. There are `programs` blocks in all, count x heads of a list (`packs`) x
    batch entries of a list. NEXT: 0. BUFFERS: of queries, 1 or 2. `scale` is in units of log 2. The
    rest is as in `attend`.
    """
    sizes = (count, giants, packs, programs, q_rows, kv_rows)
    steps = (o_b, o_h, o_l, l_b, l_h)
    range_steps = (kr_b, kr_h)
    memory, signs = room(Q_TILES, K_TILES, N, D, STAGES, BUFFERS, HALVES)
    if PARTS == 3:
        memory1, signs1 = room(Q_TILES, K_TILES, N, D, STAGES, BUFFERS, HALVES)
        memory2, signs2 = room(Q_TILES, K_TILES, N, D, STAGES, BUFFERS, HALVES)
        gl.warp_specialize([
            (consume, (
                0, memory, signs, O, L, COLS, KINDS, BLOCKS, KEY_RANGE, range_steps, steps,
                sizes, scale, Q_TILE, KV_TILE, N, D, STAGES, BUFFERS, HALVES, PARTS,
            )),
            (consume, (
                0, memory1, signs1, O, L, COLS, KINDS, BLOCKS, KEY_RANGE, range_steps, steps,
                sizes, scale, Q_TILE, KV_TILE, N, D, STAGES, BUFFERS, HALVES, PARTS,
            )),
            (consume, (
                0, memory2, signs2, O, L, COLS, KINDS, BLOCKS, KEY_RANGE, range_steps, steps,
                sizes, scale, Q_TILE, KV_TILE, N, D, STAGES, BUFFERS, HALVES, PARTS,
            )),
            (produce, (
                0, memory, signs, Q_TILES, K_TILES, V_TILES, COLS, BLOCKS, NEXT, sizes, GROUP,
                Q_TILE, KV_TILE, N, STAGES, BUFFERS, HALVES, PARTS,
            )),
            (produce, (
                1, memory1, signs1, Q_TILES, K_TILES, V_TILES, COLS, BLOCKS, NEXT, sizes, GROUP,
                Q_TILE, KV_TILE, N, STAGES, BUFFERS, HALVES, PARTS,
            )),
            (produce, (
                2, memory2, signs2, Q_TILES, K_TILES, V_TILES, COLS, BLOCKS, NEXT, sizes, GROUP,
                Q_TILE, KV_TILE, N, STAGES, BUFFERS, HALVES, PARTS,
            )),
        ], [4, 4, 1, 1, 1], [160, 160, 24, 24, 24])  # fmt: skip
    elif HALVES == 1:
        gl.warp_specialize([
            (consume, (
                0, memory, signs, O, L, COLS, KINDS, BLOCKS, KEY_RANGE, range_steps, steps,
                sizes, scale, Q_TILE, KV_TILE, N, D, STAGES, BUFFERS, HALVES, PARTS,
            )),
            (produce, (
                0, memory, signs, Q_TILES, K_TILES, V_TILES, COLS, BLOCKS, NEXT, sizes, GROUP,
                Q_TILE, KV_TILE, N, STAGES, BUFFERS, HALVES, PARTS,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (
                0, memory, signs, O, L, COLS, KINDS, BLOCKS, KEY_RANGE, range_steps, steps,
                sizes, scale, Q_TILE, KV_TILE, N, D, STAGES, BUFFERS, HALVES, PARTS,
            )),
            (consume, (
                1, memory, signs, O, L, COLS, KINDS, BLOCKS, KEY_RANGE, range_steps, steps,
                sizes, scale, Q_TILE, KV_TILE, N, D, STAGES, BUFFERS, HALVES, PARTS,
            )),
            (produce, (
                0, memory, signs, Q_TILES, K_TILES, V_TILES, COLS, BLOCKS, NEXT, sizes, GROUP,
                Q_TILE, KV_TILE, N, STAGES, BUFFERS, HALVES, PARTS,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
