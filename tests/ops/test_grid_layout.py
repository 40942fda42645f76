"""Layouts over multi-axis tiles: exact for any tiles, few bits, and counted as the spec says."""

from __future__ import annotations

import math
import random
import time

import pytest
import torch
from neighbors import random_setting, table

from foveate import Layout, attention, neighborhood
from foveate.ops.errors import InputError
from foveate.ops.layout.grid import best_tiles, grid_layout, visits

TILES = {1: [(8,), (16,), (24,)], 2: [(4, 2), (2, 8), (3, 8), (1, 16)],
         3: [(2, 2, 2), (1, 4, 4), (4, 1, 2), (3, 2, 4)]}  # fmt: skip


def cases(rank, count=25, start=0):
    for seed in range(start, start + count):
        draw = random.Random(seed)
        setting = random_setting(rank, seed, most=400)
        yield setting, draw.choice(TILES[rank]), draw.choice(TILES[rank])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_indexed_layouts_hold_exactly_the_mask(rank):
    for setting, q_tile, kv_tile in cases(rank):
        mask, want = neighborhood(*setting), table(*setting)
        grid = grid_layout(mask, q_tile, kv_tile)
        layout = grid.indexed().checked()
        assert torch.equal(layout.dense()[0, 0], want), (mask, q_tile, kv_tile)
        assert layout.pairs == want.sum()
        order = torch.randperm(mask.tokens)
        mixed = grid.indexed(order, order).checked().dense()[0, 0]
        assert torch.equal(mixed, want[order][:, order])
        mine = grid.indexed(grid.q_slots[grid.q_slots >= 0], grid.kv_slots[grid.kv_slots >= 0])
        for index, slots in ((mine.q_index, grid.q_slots), (mine.kv_index, grid.kv_slots)):
            assert (index is None) == bool((slots >= 0).all())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_tokens_in_their_slots_give_the_same_attention(rank):
    for setting, q_tile, kv_tile in cases(rank, count=12, start=100):
        mask = neighborhood(*setting)
        grid = grid_layout(mask, q_tile, kv_tile)
        q, k, v = torch.randn(3, 2, 2, mask.tokens, 8, dtype=torch.float64).unbind(0)
        real = grid.q_slots >= 0
        packed = attention(
            q[:, :, grid.q_slots.clamp_min(0)],
            *(x[:, :, grid.kv_slots.clamp_min(0)] for x in (k, v)),
            layout=grid.packed.checked(),
        )
        out, lse = torch.empty_like(q), torch.empty_like(q[..., 0])
        out[:, :, grid.q_slots[real]] = packed.out[:, :, real]
        lse[:, :, grid.q_slots[real]] = packed.lse[:, :, real]
        want = attention(q, k, v, mask, backend="reference")
        torch.testing.assert_close(out, want.out, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(lse, want.lse, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_slots_hold_every_token_once(rank):
    for setting, q_tile, kv_tile in cases(rank, count=10):
        mask = neighborhood(*setting)
        grid = grid_layout(mask, q_tile, kv_tile)
        for slots in (grid.q_slots, grid.kv_slots):
            assert torch.equal(slots[slots >= 0].sort().values, torch.arange(mask.tokens))


@pytest.mark.parametrize("beside", [(1, 0), (0, 5), (3, 9)])
def test_tokens_beside_the_grid_see_and_are_seen_by_all(beside):
    for rank in (1, 2, 3):
        for setting, q_tile, kv_tile in cases(rank, count=6, start=200):
            n = math.prod(setting[0])
            grid = grid_layout(neighborhood(*setting), q_tile, kv_tile, beside)
            want = torch.ones(n + sum(beside), n + sum(beside), dtype=torch.bool)
            inner = slice(beside[0], beside[0] + n)
            want[inner, inner] = table(*setting)
            assert torch.equal(grid.indexed().checked().dense()[0, 0], want)
            packed = grid.packed.checked().dense()[0, 0]
            real_q, real_k = grid.q_slots >= 0, grid.kv_slots >= 0
            assert torch.equal(
                packed[real_q][:, real_k], want[grid.q_slots[real_q]][:, grid.kv_slots[real_k]]
            )
            assert not packed[real_q][:, ~real_k].any()


def perfectly_sparse(mask, q_tile, kv_tile):
    """By definition: every query tile has one window, and it is made of whole key tiles."""
    slots = grid_layout(mask, q_tile, kv_tile)
    seen = mask.dense(mask.tokens, mask.tokens)[0, 0]
    rows = math.prod(q_tile)
    for tile in slots.q_slots.split(rows):
        tile = tile[tile >= 0]
        if len(tile) and not (seen[tile] == seen[tile[0]]).all():
            return False
        for keys in slots.kv_slots.split(math.prod(kv_tile)):
            part = seen[tile[0]][keys[keys >= 0]]
            if part.any() and not part.all():
                return False
    return True


def predicate(length, k, s, q_tile, kv_tile):
    """The sufficient condition on one undilated axis that is not causal."""
    if k == length:
        return True
    first_of_last = axis_start((length - 1) // s * s, length, k, s)
    groups = -(-length // s)
    aligned = (k // 2 - s // 2) % kv_tile == 0
    two = length % kv_tile == 0 and groups == 2 and s + s // 2 >= length - k
    return (
        s % q_tile == 0
        and k % kv_tile == 0
        and (length % s == 0 or first_of_last % kv_tile == 0)
        and (aligned or two)
    )


def axis_start(i, length, k, s):
    leader = min(i // s * s + s // 2, length - 1)
    return min(max(leader, k // 2), length - 1 - (k - 1) // 2) - k // 2


def test_the_predicate_implies_the_definition_and_then_no_bits_are_kept():
    claimed = missed = 0
    for length in (8, 12, 16, 24):
        for k in range(2, length + 1, 2):
            for s in range(1, k + 1):
                mask = neighborhood((length, 8), (k, 8), (s, 1))
                for q_tile, kv_tile in ((1, 1), (2, 2), (4, 2), (2, 4), (4, 4), (8, 4)):
                    tiles = (q_tile, 8), (kv_tile, 8)
                    whole = length % q_tile == 0 and length % kv_tile == 0
                    if not whole:
                        continue
                    free = len(grid_layout(mask, *tiles).packed.bits) == 0
                    claim = predicate(length, k, s, q_tile, kv_tile)
                    assert free or not claim, (mask, tiles)
                    claimed, missed = claimed + claim, missed + (free and not claim)
    assert claimed > 100
    assert missed > 0
    for setting, q_tile, kv_tile in cases(2, count=15, start=300):
        mask = neighborhood(*setting)
        if all(n % a == 0 and n % b == 0 for n, a, b in zip(mask.shape, q_tile, kv_tile)):
            free = len(grid_layout(mask, q_tile, kv_tile).packed.bits) == 0
            assert free == perfectly_sparse(mask, q_tile, kv_tile)


def test_the_predicate_implies_the_definition_on_every_axis_below_26():
    """Where key tiles divide the axis and the stride; a window that is the axis needs neither."""
    claims = 0
    for length in range(2, 26):
        for k in range(1, length + 1):
            for s in range(1, k + 1):
                spans = [axis_start(i, length, k, s) for i in range(length)]
                for q_tile in (1, 2, 3, 4, 6, 8):
                    for kv_tile in (n for n in range(1, 9) if length % n == 0):
                        if k < length and s % kv_tile:
                            continue
                        if not predicate(length, k, s, q_tile, kv_tile):
                            continue
                        claims += 1
                        for first in range(0, length, q_tile):
                            starts = set(spans[first : first + q_tile])
                            assert len(starts) == 1
                            assert min(starts) % kv_tile == 0
                            assert (min(starts) + k) % kv_tile == 0
    assert claims > 1000
    # Without a stride of whole key tiles it claims what isn't so: windows begin at 0, 2 and 3.
    assert predicate(6, 3, 2, 1, 3)
    assert [axis_start(i, 6, 3, 2) for i in range(6)] == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("length", "k", "s", "q_tile", "kv_tile"),
    [(32, 16, 16, 8, 8), (32, 16, 8, 8, 4), (64, 24, 8, 8, 8), (32, 8, 8, 4, 8)],
)
def test_the_definition_by_brute_force_and_the_same_numbers_without_the_mask(
    length, k, s, q_tile, kv_tile
):
    mask = neighborhood((length, 8), (k, 8), (s, 1))
    tiles = (q_tile, 8), (kv_tile, 8)
    assert perfectly_sparse(mask, *tiles)
    grid = grid_layout(mask, *tiles)
    assert not grid.packed.kinds.any()
    p, x = grid.packed, torch.randn(1, 1, len(grid.q_slots), 8)
    bits = torch.full((1, p.kv_tile, p.q_tile // 8), 255, dtype=torch.uint8)
    ones = torch.ones_like(p.kinds)
    masked = Layout(p.q_len, p.kv_len, p.q_tile, p.kv_tile, p.ptr, p.cols, ones, bits)
    for backend in ("auto", "blocks", "reference"):
        free, held = (attention(x, x, x, layout=y, backend=backend) for y in (p, masked))
        assert torch.equal(free.out, held.out)
        assert torch.equal(free.lse, held.lse)


@pytest.mark.parametrize(
    ("shape", "window", "stride", "q_tile", "kv_tile", "worst"),
    [
        ((30, 48, 80), (18, 24, 24), (1, 1, 1), (4, 8, 8), (2, 8, 8), 275),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 81),
        ((256, 256), (80, 80), (1, 16), (16, 16), (16, 8), 70),
        ((32768,), (2048,), (1,), (256,), (128,), 18),
    ],
)
def test_rows_list_as_many_tiles_as_the_sheet_counts(shape, window, stride, q_tile, kv_tile, worst):
    layout = grid_layout(neighborhood(shape, window, stride), q_tile, kv_tile).packed
    assert int(layout.ptr.diff().max()) == worst


@pytest.mark.parametrize(
    ("shape", "window"),
    [((32, 64, 64), (16, 24, 24)), ((360, 364), (80, 80)), ((131072,), (2048,))],
)
def test_a_layout_of_128k_tokens_is_built_at_once_and_is_small(shape, window):
    mask = neighborhood(shape, window)
    tiles = best_tiles(mask)
    start = time.process_time()
    layout = grid_layout.__wrapped__(mask, *tiles).packed
    assert time.process_time() - start < 5
    assert layout.bits.numel() < 64 << 20
    sizes = [x.numel() * x.element_size() for x in (layout.ptr, layout.cols, layout.kinds)]
    assert sum(sizes) < 64 << 20


def test_best_tiles_visit_no_more_than_any_other():
    mask = neighborhood((16, 24, 40), (5, 9, 11), (1, 3, 1))
    best = grid_layout(mask, *best_tiles(mask, 64, 32)).packed
    for q_tile in ((4, 4, 4), (1, 8, 8), (2, 4, 8), (64, 1, 1)):
        for kv_tile in ((2, 4, 4), (1, 4, 8), (2, 2, 8), (8, 2, 2)):
            assert len(best.cols) <= len(grid_layout(mask, q_tile, kv_tile).packed.cols)


def test_visits_are_those_of_the_layout():
    mask = neighborhood((37,), (9,), (2,), (3,))
    first, end = visits(mask.axes[0], 4, 8)
    layout = grid_layout(neighborhood((37, 2), (9, 2), (2, 1), (3, 1)), (4, 2), (8, 2)).packed
    assert (end - first).tolist() == layout.ptr.diff()[0, 0].tolist()
    assert first.tolist() == layout.cols[layout.ptr[0, 0, :-1]].tolist()


def test_tiles_that_kernels_do_not_take_are_refused():
    mask = neighborhood((8, 8), 3)
    with pytest.raises(InputError, match="multiple of 8"):
        grid_layout(mask, (3, 3), (4, 4))
    with pytest.raises(InputError, match="expected 2 sizes"):
        grid_layout(mask, (8,), (4, 4))
