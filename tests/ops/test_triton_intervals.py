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


def test_decoding_keeps_its_bits() -> None:
    assert Plan is type(plan_of(causal().layout(1, 40, 16)))
    assert plan_of(causal().layout(1, 40, 16)).key_ranges is None
