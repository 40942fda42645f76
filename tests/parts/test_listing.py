"""Layouts of runs, single keys and tiles against boolean tables filled in loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.ops import blocks, causal, documents, padding, sinks, window
from foveate.parts import Context
from foveate.parts.attention import mask_layout
from foveate.parts.listing import Runs, Singles, is_relative, layout_of_runs, restrict
from foveate.parts.tokens import tokens_of

MASKS = {
    "causal": lambda b, h, n: causal(),
    "band": lambda b, h, n: causal() & window(20, -1),
    "sinks": lambda b, h, n: causal() & (window(9, 0) | sinks(3)),
    "padding": lambda b, h, n: causal() & padding([n] * (b - 1) + [max(1, n - 9)]),
    "documents": lambda b, h, n: causal() & documents([0, n // 3, n]),
    "table": lambda b, h, n: blocks(torch.rand(b, h, n, n) < 0.6, 1) & causal(),
    "heads": lambda b, h, n: blocks(torch.rand(h, -(-n // 4), -(-n // 4)) < 0.6, 4),
    "not": lambda b, h, n: ~(window(6, -1) & window(2, 30)),
}


def random_choice(groups, rows, kv_len, tile):
    """Runs and single keys that don't overlap, and per (group, row tile) the set of their keys."""
    runs, singles, keys = [], [], {}
    for g in range(groups):
        for r in range(rows):
            taken: set[int] = set()
            start = int(torch.randint(0, tile, ()))
            while start < kv_len:
                if torch.rand(()) < 0.5:
                    runs.append((g, r, start))
                    taken |= set(range(start, min(start + tile, kv_len)))
                start += tile + int(torch.randint(0, 5, ())) * int(torch.rand(()) < 0.4)
            free = [j for j in range(kv_len) if j not in taken and torch.rand(()) < 0.3]
            singles += [(g, r, j) for j in free]
            keys[g, r] = taken | set(free)

    def columns(rows_of):
        return [torch.tensor(c) for c in zip(*rows_of)] or [torch.zeros(0).long()] * 3

    return Runs(*columns(runs)), Singles(*columns(singles)), keys


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(MASKS)),
    batch=st.integers(1, 2),
    heads=st.sampled_from([1, 2]),
    kv_len=st.integers(1, 60),
    share=st.floats(0.05, 1.0),
    pads=st.integers(0, 7),
    seed=st.integers(0, 10**6),
)
def test_what_is_chosen_and_allowed_is_listed_once(name, batch, heads, kv_len, share, pads, seed):
    torch.manual_seed(seed)
    tile, q_len = 8, max(1, int(share * kv_len))
    mask = MASKS[name](batch, heads, kv_len)
    shift = torch.arange(batch)[:, None] * pads
    kv_positions = torch.arange(kv_len) - shift
    if name == "documents" or name == "table" or name == "heads":
        kv_positions = kv_positions + shift
    fields = {"q_positions": kv_positions[:, kv_len - q_len :], "kv_positions": kv_positions}
    q, k = torch.zeros(batch, heads, q_len, 4), torch.zeros(batch, 1, kv_len, 4)
    ctx = Context(mask=mask, **fields)
    runs, singles, keys = random_choice(batch * heads, -(-q_len // tile), kv_len, tile)
    sizes = (batch, heads, q_len, kv_len)
    layout = layout_of_runs(runs, singles, mask, tokens_of(q, k, ctx), sizes, tile)

    allowed = mask.dense(q_len, kv_len, **fields).expand(batch, heads, q_len, kv_len)
    expected = torch.zeros(sizes, dtype=torch.bool)
    for (g, r), chosen in keys.items():
        part = slice(r * tile, (r + 1) * tile)
        for j in chosen:
            expected[g // heads, g % heads, part, j] = allowed[g // heads, g % heads, part, j]
    assert torch.equal(layout.dense(), expected)
    # Each pair once: the sum over entries is the number of pairs.
    assert int(layout.pairs_by_group().sum()) == int(expected.sum())
    # Nothing empty is visited, and distinct bit tiles are stored once.
    entries = torch.arange(len(layout.cols))
    assert layout.entry_mask(entries).flatten(1).any(1).all()
    flat = layout.bits.flatten(1)
    assert len(torch.unique(flat, dim=0)) == len(flat)


def test_equal_runs_of_all_heads_and_rows_are_stored_once():
    q, k = torch.zeros(1, 4, 64, 4), torch.zeros(1, 1, 64, 4)
    ctx = Context(mask=causal())
    group = torch.arange(4).repeat_interleave(8)
    row = torch.arange(8).repeat(4)
    runs = Runs(group, row, torch.full((32,), 3))
    none = Singles(*[torch.zeros(0).long()] * 3)
    layout = layout_of_runs(runs, none, causal(), tokens_of(q, k, ctx), (1, 4, 64, 64), 8)
    assert layout.gathered.tolist() == [list(range(3, 11))]


@pytest.mark.parametrize(
    ("mask", "relative"),
    [
        (causal(), True),
        (causal() & (window(3, 0) | ~window(5, -1)), True),
        (causal(block=4), False),
        (window(3, 0, block=2), False),
        (causal() & sinks(2), False),
        (blocks(torch.ones(2, 2).bool(), 1), False),
    ],
    ids=repr,
)
def test_masks_of_distance_alone(mask, relative):
    assert is_relative(mask) is relative


@pytest.mark.parametrize("name", sorted(MASKS))
def test_restricting_a_layout_is_masking_its_tiles(name):
    batch, heads, length, tile = 2, 2, 53, 8
    mask = MASKS[name](batch, heads, length)
    q, k = torch.zeros(batch, heads, length, 4), torch.zeros(batch, heads, length, 4)
    tiles = torch.rand(batch, heads, 7, 7) < 0.5
    layout = restrict(mask_layout(mask, q, k, Context(), tile), tiles)
    wide = tiles.repeat_interleave(tile, 2).repeat_interleave(tile, 3)[..., :length, :length]
    assert torch.equal(layout.dense(), mask.dense(length, length) & wide)
