"""Whether a layout's lists make sense: kernels read memory by them, so they are looked at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from foveate.ops.errors import InputError

if TYPE_CHECKING:
    from foveate.ops.layout.core import Layout


def check_lists(layout: Layout) -> None:
    """Refuse a layout whose lists contradict each other or its lengths.

    Raises:
        InputError: which list, what was expected.
    """
    batches, heads = layout.groups
    n = layout.cols.numel()
    _expect(
        "q_tile and kv_tile", layout.q_tile % 8 == 0 and layout.kv_tile % 8 == 0, "multiples of 8"
    )
    _expect("ptr", layout.q_tiles == -(-layout.q_rows // layout.q_tile), "one row per query tile")
    _expect("kinds", layout.kinds.shape == layout.cols.shape, f"as many as cols, {n}")
    steps = layout.ptr.diff(dim=-1)
    rising = not layout.ptr.numel() or bool((steps >= 0).all())
    _expect("ptr", rising and _within(layout.ptr, 0, n), f"rising offsets from 0 to {n}")
    shape = (layout.kv_tile, layout.q_tile // 8)
    _expect("bits", tuple(layout.bits.shape[1:]) == shape, f"(n, {shape[0]}, {shape[1]})")
    lists = 0
    if layout.gathered is not None:
        lists = layout.gathered.shape[0]
        _expect(
            "gathered", layout.gathered.shape[1:] == (layout.kv_tile,), f"(m, {layout.kv_tile})"
        )
        _expect("gathered", _within(layout.gathered, -1, layout.kv_rows - 1), "keys, or -1")
    last = layout.kv_tiles + lists - 1
    _expect("cols", _within(layout.cols, 0, last), f"key tiles 0 to {last}")
    low = -2 if layout.row_range is not None else -1 if layout.key_range is not None else 0
    most = layout.bits.shape[0]
    _expect(
        "kinds", _within(layout.kinds, low, most), f"{low} to {most}: what there are tables for"
    )
    for name, table, most in (
        ("q_index", layout.q_index, layout.q_len - 1),
        ("kv_index", layout.kv_index, layout.kv_len - 1),
    ):
        if table is not None:
            _expect(name, _grouped(table, batches, heads, 3), "(Bm or 1, Hm or 1, n)")
            _expect(name, _within(table, -1, most), f"indices up to {most}, or -1")
    for name, table, rows in (
        ("key_range", layout.key_range, layout.q_rows),
        ("row_range", layout.row_range, layout.kv_rows),
    ):
        if table is not None:
            fits = _grouped(table, batches, heads, 4) and tuple(table.shape[2:]) == (rows, 2)
            _expect(name, fits, f"(Bm or 1, Hm or 1, {rows}, 2)")


def _expect(name: str, holds: bool, what: str) -> None:
    if not holds:
        raise InputError(f"The layout's {name} doesn't fit: expected {what}.")


def _within(table: Tensor, low: int, high: int) -> bool:
    if not table.numel():
        return True
    least, most = table.aminmax()
    return low <= int(least) and int(most) <= high


def _grouped(table: Tensor, batches: int, heads: int, dims: int) -> bool:
    return table.dim() == dims and table.shape[0] in (1, batches) and table.shape[1] in (1, heads)
