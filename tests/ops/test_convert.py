"""Layouts from and to other people's forms: one mask, every form, the same pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from foveate.ops import Layout, attention, blocks, causal, documents, prefix, sinks, window
from foveate.ops.errors import InputError


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.sampled_from([8, (16, 8)]))
def test_documents_in_every_form(lengths, tile):
    """longca-bench, oracle 4: predicate = slices = column intervals = block lists."""
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    n = cu[-1]
    doc = torch.bucketize(torch.arange(n), torch.tensor(cu), right=True)
    want = ((doc[:, None] == doc) & torch.ones(n, n, dtype=torch.bool).tril())[None, None]
    assert torch.equal((causal() & documents(cu)).layout(n, n, tile).dense(), want)
    spans = list(zip(cu, cu[1:]))
    slices = Layout.from_slices([(s, s, "causal") for s in spans], n, n, tile)
    assert torch.equal(slices.dense(), want)
    ends = torch.tensor(cu[1:])[doc - 1]
    zero = torch.zeros(n, dtype=torch.int64)
    columns = Layout.from_column_intervals(
        ends, torch.full((n,), n), zero, torch.arange(n), n, tile
    )
    assert torch.equal(columns.dense(), want)
    assert torch.equal(Layout.from_dense(want, tile).dense(), want)
    flex = create_block_mask(
        lambda b, h, i, j: (doc[i] == doc[j]) & (i >= j), None, None, n, n, device="cpu"
    )
    assert torch.equal(Layout.from_block_mask(flex).dense(), want)


# longca-bench, section 1: the worked example's column intervals, S = 16, documents 5, 4, 7.
COLUMNS = {
    "causal document": ([5] * 5 + [9] * 4 + [16] * 7, [16] * 16, range(16), 53),
    "shared question": ([16] * 5 + [9] * 4 + [16] * 7, [16] * 16, range(16), 108),
    "causal blockwise": ([5] * 5 + [16] * 11, [9] * 5 + [16] * 11, range(16), 116),
    "prefix document": (
        [5] * 5 + [9] * 4 + [16] * 7,
        [16] * 16,
        [0, 0, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 15],
        57,
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_areas_of_column_intervals(name):
    lts, lte, ute, area = COLUMNS[name]
    layout = Layout.from_column_intervals(
        torch.tensor(lts), torch.tensor(lte), torch.zeros(16).long(), torch.tensor(list(ute)), 16, 8
    )
    assert layout.pairs == area


def test_column_intervals_by_head_and_on_whole_tiles():
    start = torch.randint(0, 60, (2, 3, 60))
    end = start + torch.randint(0, 30, (2, 3, 60))
    zero = torch.zeros_like(start)
    layout = Layout.from_column_intervals(start, end, zero, zero, 60, 8)
    row = torch.arange(60)[:, None]
    want = ~((row >= start[:, :, None]) & (row < end[:, :, None]))
    assert torch.equal(layout.dense(), want)
    from_16, to_48, never = (torch.full((64,), n) for n in (16, 48, 0))
    dark = Layout.from_column_intervals(from_16, to_48, never, never, 64, 16)
    assert dark.tile_density == 0.5
    assert len(dark.bits) == 0


def test_slices_of_every_type():
    """longca-bench: causal sliding = causal + bi_causal; prefix causal = full + causal."""
    w, p, n = 5, 11, 40
    sliding = Layout.from_slices(
        [((0, w + 1), (0, w + 1), "causal"), ((w + 1, n), (1, n), "bi_causal")], n, n, 8
    )
    assert torch.equal(sliding.dense(), (causal() & window(w, 0)).dense(n, n))
    mixed = Layout.from_slices([((0, p), (0, p), "full"), ((p, n), (0, n), "causal")], n, n, 8)
    assert torch.equal(mixed.dense(), (prefix(p) | causal()).dense(n, n))
    upper = Layout.from_slices([((0, 9), (3, 20), "inv_causal")], 9, 20, 8).dense()[0, 0]
    want = torch.zeros(9, 20, dtype=torch.bool)
    want[:, 3:] = torch.ones(9, 17, dtype=torch.bool).triu()
    assert torch.equal(upper, want)


def test_bad_forms_are_refused():
    with pytest.raises(InputError, match="overlap"):
        Layout.from_slices([((0, 4), (0, 4), "full"), ((2, 6), (2, 6), "full")], 8, 8)
    with pytest.raises(InputError, match="'diagonal'"):
        Layout.from_slices([((0, 4), (0, 4), "diagonal")], 8, 8)
    with pytest.raises(InputError, match="expected bool"):
        Layout.from_dense(torch.zeros(4, 4))
    with pytest.raises(InputError, match="tiles: expected bool"):
        Layout.from_tiles(torch.ones(1, 1, 2, 3).bool(), 16, 16, 8)
    picked = Layout.from_selection(
        torch.zeros(1, 1, 2, 2).bool(), torch.ones(1, 1, 2, 16).bool(), 16, 16, 8
    )
    with pytest.raises(InputError, match="can't gather single keys"):
        picked.to_block_mask()


@pytest.mark.parametrize("seed", range(3))
def test_block_masks_there_and_back(seed):
    torch.manual_seed(seed)
    table = torch.rand(2, 4, 50, 70) > 0.8
    layout = (blocks(table, 1) & (causal() | sinks(9))).layout(50, 70, (16, 32))
    flex = layout.to_block_mask()
    assert torch.equal(Layout.from_block_mask(flex).dense(), layout.dense())
    visited = layout.dense().unflatten(3, (70, 1)).any(-1)
    assert torch.equal(visited, layout.dense())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "mask", [None, causal() & (window(20, 0) | sinks(2)), documents([0, 33, 100])]
)
def test_flex_agrees(mask):
    """An implementation that is not ours, over our block masks."""
    q, k, v = (torch.randn(2, h, n, 16) for h, n in ((4, 70), (2, 100), (2, 100)))
    bias = torch.randn(4, 70, 100)
    got = attention(q, k, v, mask, softcap=3.0, bias=bias, backend="flex")
    want = attention(q, k, v, mask, softcap=3.0, bias=bias, backend="blocks")
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 20, 64])
def test_picture_counts_pairs(size):
    layout = (causal() & (window(9, 0) | sinks(3))).layout(50, 70, 8)
    got = layout.picture(size)
    dense = layout.dense()[0, 0].float()
    cell_q, cell_k = -(-50 // size), -(-70 // size)
    for i in range(got.shape[0]):
        for j in range(got.shape[1]):
            part = dense[i * cell_q : (i + 1) * cell_q, j * cell_k : (j + 1) * cell_k]
            assert got[i, j] == pytest.approx(part.mean().item(), abs=1e-6)
