"""Lists over smaller tiles see what the layout sees, and visit no more than they must."""

from __future__ import annotations

import gc
import weakref
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import masks

from foveate.ops import Layout, causal, documents, window
from foveate.ops.layout import FULL
from foveate.ops.triton import fine
from foveate.ops.triton.fine import finer
from foveate.ops.triton.plan import plan_of


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_same_is_seen(data: st.DataObject) -> None:
    q_len, kv_len = data.draw(st.integers(9, 70)), data.draw(st.integers(1, 70))
    mask, _ = data.draw(masks(kv_len))
    tile = data.draw(st.sampled_from([(16, 16), (32, 16), (16, 48), (64, 64)]))
    layout = mask.layout(q_len, kv_len, tile)
    rows, keys = data.draw(st.sampled_from([(8, 8), (16, 8), (8, 16), (32, 32)]))
    with patch.object(fine, "_WORTH", 2.0):  # whether it pays or not
        smaller = finer(layout, rows, keys)
    if smaller is None:
        cut = tile[0] % min(rows, tile[0]) or tile[1] % min(keys, tile[1])
        assert cut or not layout.bits.shape[0] or (rows >= tile[0] and keys >= tile[1])
        return
    assert torch.equal(smaller.dense(), layout.dense())
    assert (smaller.q_tile, smaller.kv_tile) == (min(rows, tile[0]), min(keys, tile[1]))
    assert smaller.sound
    # No entry says nothing, and none that says all carries bits; what bits say of rows and keys
    # past the ends is anything.
    every = torch.arange(smaller.cols.numel())
    inside = (smaller.entry_queries(every) >= 0).all(1) & (smaller.entry_keys(every) >= 0).all(1)
    seen = smaller.entry_mask(every).flatten(1)
    assert seen[inside].any(1).all()
    assert not seen[inside & (smaller.kinds > 0)].all(1).any()


def test_groups_of_batch_and_heads() -> None:
    allowed = torch.rand(2, 3, 60, 50, generator=torch.Generator().manual_seed(0)) < 0.02
    layout = Layout.from_dense(allowed, 32)
    smaller = finer(layout, 16, 8)
    assert smaller is not None
    assert torch.equal(smaller.dense(), layout.dense())


def test_what_is_gained() -> None:
    layout = window(200, 0).layout(1024, 1024, (128, 128))
    smaller = finer(layout, 64, 64)
    assert smaller is not None
    assert smaller.tile_area < 0.85 * layout.tile_area
    whole = [float((x.kinds == FULL).sum() * x.q_tile * x.kv_tile) for x in (layout, smaller)]
    assert whole[1] > whole[0]


@pytest.mark.parametrize(
    ("layout", "block"),
    [
        (causal().layout(4096, 4096, (64, 64)), (64, 64)),  # as small already
        (Layout.from_dense(torch.ones(256, 256) > 0, 128), (64, 64)),  # all whole
        (documents([0, 128, 256]).layout(256, 256, 128), (64, 64)),  # likewise
        (causal().layout(1, 512, 128), (64, 64)),  # decoding
        (causal().layout(200, 200, (24, 24)), (16, 16)),  # no whole number of blocks
    ],
)
def test_lists_that_stay(layout: Layout, block: tuple[int, int]) -> None:
    plan = plan_of(layout)
    assert plan.finer(*block) is plan


def test_a_plan_keeps_its_finer_one() -> None:
    plan = plan_of(causal().layout(512, 512, 128))
    assert plan.finer(64, 64) is plan.finer(64, 64)
    assert plan.finer(64, 64) is not plan


@pytest.mark.parametrize("tile", [(128, 128), (256, 64)])
def test_blocks_of_a_plan(tile: tuple[int, int]) -> None:
    low, high = torch.arange(700) - 300, torch.arange(700) - 100
    at = torch.arange(500)
    allowed = (at >= low[:, None] - 10 * torch.arange(6).reshape(2, 3, 1, 1)) & (at < high[:, None])
    layout = Layout.from_dense(allowed, tile)
    plan = plan_of(layout)
    assert plan.key_ranges is not None
    blocks = plan.blocks(128)
    subs = tile[0] // 128
    assert blocks.shape == (6 * plan.q_tiles * subs, 9)
    seen = set()
    for row0, b, h, start, mid, end, first, until, tile0 in blocks.tolist():
        seen.add((row0, b, h))
        item = (b * 3 + h) * plan.q_tiles + row0 // tile[0]
        mine = layout.entry_rows == item
        assert end - start == int(mine.sum())
        assert sorted(plan.by_row.tiles[start:end].tolist()) == layout.cols[mine].tolist()
        assert (plan.by_row.kinds[start:mid] == FULL).all()
        assert tile0 == (int(plan.by_row.tiles[start]) if start < end else 0)
        keys = allowed[b, h, row0 : row0 + 128].any(0).nonzero()[:, 0]
        if keys.numel():
            assert (first, min(until, 500)) == (int(keys[0]), int(keys[-1]) + 1)
        else:
            assert first >= until
    assert len(seen) == len(blocks)
    # Longest lists of a group first.
    work = (blocks[:, 5] - blocks[:, 3]).reshape(6, -1, subs)[:, :, 0]
    assert (work.diff(dim=1) <= 1).all()


@pytest.mark.parametrize(
    "layout", [causal().layout(512, 512, 128), documents([0, 128, 256]).layout(256, 256, 128)]
)
def test_plans_end_with_their_layouts(layout: Layout) -> None:
    own = Layout(
        layout.q_len, layout.kv_len, 128, 128, layout.ptr, layout.cols, layout.kinds, layout.bits
    )
    plan = plan_of(own)
    plan.finer(64, 64)
    dead = weakref.ref(plan)
    gc.disable()
    try:
        del own, plan
        assert dead() is None
    finally:
        gc.enable()
