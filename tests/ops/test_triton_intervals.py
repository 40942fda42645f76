"""Ranges told from bit tiles see what the bit tiles see, by rows and by keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import masks
from torch import Tensor

from foveate.ops import Layout, Mask, causal, documents, sinks, window
from foveate.ops.layout import KEY_RANGE, ROW_RANGE
from foveate.ops.triton import intervals
from foveate.ops.triton.plan import Plan, plan_of


def told(layout: Layout) -> tuple[Tensor | None, Tensor | None]:
    plan = plan_of(layout)
    return plan.key_ranges, plan.row_ranges


def seen_by_ranges(layout: Layout, kind: int, table: Tensor) -> Tensor:
    """The layout with its bit tiles taken by ranges, element by element."""
    kinds = torch.where(layout.kinds > 0, kind, layout.kinds)
    name = "key_range" if kind == KEY_RANGE else "row_range"
    size = layout.q_rows if kind == KEY_RANGE else layout.kv_rows
    changed = {
        "kinds": kinds,
        "bits": layout.bits[:0],
        name: table[:, :, :size],
    }
    rest = {f: getattr(layout, f) for f in ("q_len", "kv_len", "q_tile", "kv_tile", "ptr", "cols")}
    return Layout(**rest, **changed).dense()


@pytest.mark.parametrize(
    "mask", [causal(), window(9, 3), causal() & documents([0, 13, 50]), documents([0, 20, 21, 50])]
)
def test_runs_are_told_as_ranges(mask: Mask) -> None:
    layout = mask.layout(50, 50, (16, 8))
    by_row, by_key = told(layout)
    assert by_row is not None
    assert by_key is not None
    want = layout.dense()
    torch.testing.assert_close(seen_by_ranges(layout, KEY_RANGE, by_row), want)
    torch.testing.assert_close(seen_by_ranges(layout, ROW_RANGE, by_key), want)


@pytest.mark.parametrize("lengths", [(50, 83), (83, 50), (45, 45)])
def test_tiles_that_cross_the_ends_have_ranges_too(lengths: tuple[int, int]) -> None:
    layout = window(20, 0).layout(*lengths, (16, 8))
    for kind, table in zip((KEY_RANGE, ROW_RANGE), told(layout)):
        assert table is not None
        torch.testing.assert_close(seen_by_ranges(layout, kind, table), layout.dense())


@pytest.mark.parametrize("mask", [window(3, 0) | sinks(2), causal() & ~window(2, 2)])
def test_gaps_within_visited_tiles_keep_their_bits(mask: Mask) -> None:
    layout = mask.layout(40, 40, (40, 40))
    assert told(layout)[0] is None or layout.dense().equal(
        seen_by_ranges(layout, KEY_RANGE, told(layout)[0])
    )
    assert plan_of((window(3, 0) | sinks(2)).layout(40, 40, (40, 40))).key_ranges is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_told_is_right(data: st.DataObject) -> None:
    q_len, kv_len = data.draw(st.integers(9, 60)), data.draw(st.integers(1, 60))
    mask, _ = data.draw(masks(kv_len))
    layout = mask.layout(q_len, kv_len, (8, 16))
    for kind, table in zip((KEY_RANGE, ROW_RANGE), told(layout)):
        if table is not None:
            torch.testing.assert_close(seen_by_ranges(layout, kind, table), layout.dense())


@pytest.mark.parametrize("lines", [1, 1 << 22])
@pytest.mark.parametrize("groups", [(1, 3), (2, 1), (2, 3)])
def test_each_group_has_its_own(groups, lines, monkeypatch) -> None:
    monkeypatch.setattr(intervals, "_LINES", lines)
    low = torch.randint(0, 20, (*groups, 50)).sort(-1).values
    high = low + torch.randint(0, 30, low.shape)
    at = torch.arange(45)
    allowed = (at >= low[..., None]) & (at < high[..., None])
    by_row = Layout.from_dense(allowed, (16, 8))
    table = told(by_row)[0]
    assert table is not None
    assert seen_by_ranges(by_row, KEY_RANGE, table).equal(allowed)
    by_key = Layout.from_dense(allowed.mT, (8, 16))
    table = told(by_key)[1]
    assert table is not None
    assert seen_by_ranges(by_key, ROW_RANGE, table).equal(allowed.mT)
    allowed[-1, -1, 20] = at % 2 == 0  # one row with gaps, in one group
    assert told(Layout.from_dense(allowed, (16, 8)))[0] is None
    assert told(Layout.from_dense(allowed.mT, (8, 16)))[1] is None


def test_keys_that_no_row_of_a_tile_sees_keep_their_bits() -> None:
    allowed = torch.zeros(32, 64, dtype=torch.bool)
    allowed[:10, :10] = True
    allowed[12:, 20:40] = True
    assert told(Layout.from_dense(allowed, (16, 64)))[0] is None
    allowed[10:12, 10:20] = True
    layout = Layout.from_dense(allowed, (16, 64))
    table = told(layout)[0]
    assert table is not None
    assert seen_by_ranges(layout, KEY_RANGE, table)[0, 0].equal(allowed)


def test_decoding_keeps_its_bits() -> None:
    assert Plan is type(plan_of(causal().layout(1, 40, 16)))
    assert plan_of(causal().layout(1, 40, 16)).key_ranges is None
