"""Layouts of single heads as one: every head sees what its own says."""

from __future__ import annotations

import pytest
import torch

from foveate.ops import Layout, causal, padding, sinks, window
from foveate.ops.errors import InputError
from foveate.ops.layout.join import by_heads, heads_as_rows, tiled_row


@pytest.mark.parametrize("lengths", [(1, 70), (40, 70)])
def test_every_head_has_its_own(lengths: tuple[int, int]) -> None:
    masks = [causal(), window(9, 0) | sinks(3), causal() & padding(torch.tensor([60, 33]))]
    layouts = [mask.layout(*lengths, 16) for mask in masks]
    owner = [2, 0, 0, 1, 2]
    found = by_heads(layouts, owner)
    assert found.groups == (2, 5)
    assert found.sound
    for head, one in enumerate(owner):
        want = layouts[one].dense().expand(2, -1, -1, -1)[:, 0]
        assert torch.equal(found.dense()[:, head], want)


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(InputError, match="same sizes"):
        by_heads([causal().layout(40, 70, 16), causal().layout(40, 70, 32)], [0, 1])
    keys = torch.rand(1, 1, 2, 70) < 0.2
    single = Layout.from_selection(torch.zeros(1, 1, 2, 3) > 0, keys, 40, 70, 32)
    with pytest.raises(InputError, match="tiles and bits alone"):
        by_heads([single], [0])
    two, three = (padding(torch.tensor([9] * n)).layout(40, 70, 16) for n in (2, 3))
    with pytest.raises(InputError, match="1 or 3 batch entries"):
        by_heads([two, three], [0, 1])


@pytest.mark.parametrize("kv_len", [16, 70, 33])
@pytest.mark.parametrize("group", [1, 3, 8, 9, 20])
def test_heads_as_rows_see_what_each_head_sees(group: int, kv_len: int) -> None:
    masks = [causal(), window(9, 0) | sinks(3), causal() & padding(torch.tensor([kv_len, 5]))]
    dense = [mask.dense(1, kv_len)[:, 0, 0] for mask in masks]
    owner = tuple(torch.randint(3, (2 * group,), generator=torch.manual_seed(group)).tolist())
    found = heads_as_rows([tiled_row(x, 16) for x in dense], owner, group, kv_len, 16)
    assert found.sound
    assert (found.q_len, found.kv_len, found.groups) == (group, kv_len, (2, 2))
    want = torch.stack([dense[i].expand(2, -1) for i in owner], 1).view(2, 2, group, kv_len)
    assert torch.equal(found.dense(), want)
    # Nothing is visited in vain, and bits are read for tiles alone where someone doesn't see all.
    tiles = torch.nn.functional.pad(want, (0, -kv_len % 16)).unflatten(3, (-1, 16))
    assert len(found.cols) == int(tiles.any(4).any(2).sum())
    real = torch.nn.functional.pad(want, (0, -kv_len % 16), value=True).view_as(tiles)
    assert int((found.kinds == 0).sum()) == int(real.all(4).all(2).sum())
