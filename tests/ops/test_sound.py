"""Layouts whose lists make no sense are refused before a kernel reads by them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foveate.ops import Layout, attention, causal, window
from foveate.ops.errors import InputError

GOOD = causal().layout(64, 64, 16)
SPAN = torch.zeros(1, 1, 64, 2).int()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ptr": GOOD.ptr + 5}, "ptr doesn't fit: expected rising offsets"),
        ({"ptr": GOOD.ptr[..., :2]}, "one row per query tile"),
        ({"ptr": GOOD.ptr.flip(-1)}, "rising"),
        ({"kinds": GOOD.kinds[1:]}, "kinds doesn't fit"),
        ({"kinds": GOOD.kinds + 1}, "kinds doesn't fit"),
        ({"kinds": GOOD.kinds - 1}, "what there are tables for"),
        ({"cols": GOOD.cols + 1}, "cols doesn't fit: expected key tiles 0 to 3"),
        ({"bits": GOOD.bits[:, :8]}, "bits doesn't fit"),
        ({"gathered": torch.full((1, 16), 64)}, "gathered doesn't fit"),
        ({"gathered": torch.zeros(1, 8).int()}, "gathered doesn't fit"),
        ({"q_index": torch.full((1, 1, 64), 64)}, "q_index doesn't fit"),
        ({"kv_index": torch.full((1, 3, 64), 0)}, "kv_index doesn't fit"),
        ({"row_range": SPAN[:, :, :3]}, "row_range doesn't fit"),
        ({"key_range": SPAN[..., :1]}, "key_range doesn't fit"),
        ({"q_tile": 20, "ptr": GOOD.ptr}, "multiples of 8"),
    ],
)
def test_lists_that_contradict_each_other(change, says):
    layout = replace(GOOD, **change, _counts=[])
    q = torch.randn(1, 2, 64, 8)
    with pytest.raises(InputError, match=says):
        attention(q, q, q, layout=layout)


def test_what_the_builders_make_is_sound():
    assert GOOD.sound
    assert window(-1, -1).layout(0, 5, 8).sound
    assert window(-1, -1).layout(5, 0, 8).sound
    tiles, keys = torch.rand(2, 3, 4, 5) > 0.5, torch.rand(1, 3, 4, 70) > 0.5
    assert Layout.from_selection(tiles, keys, 60, 70, 16, causal()).sound
