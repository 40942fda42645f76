"""The catalogue against the spec's worked example, plain predicates, and its own layouts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.bench import catalogue, patterns
from foveate.bench.catalogue import Settings
from foveate.ops import Layout
from foveate.ops.errors import InputError

# 16 tokens, documents of 5, 4 and 7, w = 2, g = 2, P = 6, prefixes 2, 1, 3, b = 2.
EXAMPLE = Settings((0, 5, 9, 16), 2, 2, 6, (2, 1, 3), 2, ((4, 7),))
AREAS = {
    "full": 256, "causal": 136, "full-document": 90, "causal-document": 53, "sliding": 74,
    "causal-sliding": 45, "shared-question": 108, "global-sliding": 124, "causal-blockwise": 116,
    "prefix-causal": 151, "prefix-document": 57, "block-causal-document": 60, "qk-sparse": 130,
}  # fmt: skip
# Visited and full blocks of 4 x 4.
BLOCKS = {
    "causal": (10, 6), "causal-document": (7, 0), "shared-question": (10, 3),
    "causal-blockwise": (10, 3), "prefix-causal": (11, 7), "global-sliding": (14, 1),
}  # fmt: skip


def dense(name: str, s: Settings) -> Tensor:
    case = patterns.make(name, s)
    return case.allowed(torch.arange(s.length))[0, 0]


@pytest.mark.parametrize(("name", "area"), AREAS.items())
def test_areas_of_the_worked_example(name, area):
    assert int(dense(name, EXAMPLE).sum()) == area


@pytest.mark.parametrize(("name", "counts"), BLOCKS.items())
def test_blocks_of_the_worked_example(name, counts):
    cut = dense(name, EXAMPLE).reshape(4, 4, 4, 4).transpose(1, 2).flatten(2)
    assert (int(cut.any(-1).sum()), int(cut.all(-1).sum())) == counts


@pytest.mark.parametrize(
    ("name", "lts", "lte"),
    [
        ("causal-document", [5] * 5 + [9] * 4 + [16] * 7, [16] * 16),
        ("shared-question", [16] * 5 + [9] * 4 + [16] * 7, [16] * 16),
        ("causal-blockwise", [5] * 5 + [16] * 11, [9] * 5 + [16] * 11),
        ("qk-sparse", [*range(16)], [7 if j in (4, 5, 6) else j for j in range(16)]),
    ],
)
def test_column_intervals_of_the_worked_example(name, lts, lte):
    keys = torch.arange(16)
    told = Layout.from_column_intervals(
        torch.tensor(lts), torch.tensor(lte), torch.zeros_like(keys), keys, 16, 8
    )
    assert torch.equal(told.dense()[0, 0], dense(name, EXAMPLE))


def test_slices_of_the_worked_example():
    docs = [(0, 5), (5, 9), (9, 16)]
    shared = [(d, d, "causal") for d in docs] + [(d, docs[0], "full") for d in docs[1:]]
    blockwise = [(d, d, "causal") for d in docs[:2]] + [(docs[2], (0, 16), "causal")]
    prefixed = [((0, 6), (0, 6), "full"), ((6, 16), (0, 16), "causal")]
    sliding = [((0, 3), (0, 3), "causal"), ((3, 16), (1, 16), "bi_causal")]
    for name, slices in (
        ("shared-question", shared),
        ("causal-blockwise", blockwise),
        ("prefix-causal", prefixed),
        ("causal-sliding", sliding),
    ):
        assert torch.equal(
            Layout.from_slices(slices, 16, 16, 8).dense()[0, 0], dense(name, EXAMPLE)
        )


Predicate = Callable[[int, int, Settings], bool]


def doc(i: int, s: Settings) -> int:
    return max(d for d, start in enumerate(s.bounds[:-1]) if start <= i)


def same(i: int, j: int, s: Settings) -> bool:
    return doc(i, s) == doc(j, s)


def at(i: int, s: Settings) -> int:
    return i - s.bounds[doc(i, s)]


PREDICATES: dict[str, Predicate] = {
    "full": lambda i, j, s: True,
    "causal": lambda i, j, s: j <= i,
    "full-document": same,
    "causal-document": lambda i, j, s: same(i, j, s) and j <= i,
    "sliding": lambda i, j, s: abs(i - j) <= s.window,
    "causal-sliding": lambda i, j, s: 0 <= i - j <= s.window,
    "shared-question": lambda i, j, s: j <= i and (doc(j, s) == 0 or same(i, j, s)),
    "global-sliding": lambda i, j, s: abs(i - j) <= s.window or min(i, j) < s.global_tokens,
    "causal-blockwise": lambda i, j, s: (
        j <= i and (same(i, j, s) or doc(i, s) == len(s.bounds) - 2)
    ),
    "prefix-causal": lambda i, j, s: j <= i or max(i, j) < s.prefix,
    "prefix-document": lambda i, j, s: (
        same(i, j, s) and (j <= i or max(at(i, s), at(j, s)) < s.prefixes[doc(i, s)])
    ),
    "block-causal-document": lambda i, j, s: (
        same(i, j, s) and at(j, s) // s.block <= at(i, s) // s.block
    ),
    "qk-sparse": lambda i, j, s: (
        j <= i and not any(a <= i < b and a <= j < b for a, b in s.squares)
    ),
}


def test_every_fixed_mask_has_its_predicate():
    assert {*PREDICATES, "hash-sparse"} == set(catalogue.FIXED)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    window=st.integers(0, 6),
    global_tokens=st.integers(1, 4),
    shares=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    block=st.integers(1, 5),
    square=st.tuples(st.integers(0, 9), st.integers(1, 9)),
)
def test_masks_equal_their_predicates(sizes, window, global_tokens, shares, block, square):
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    prefixes = tuple(int(share * size) for share, size in zip(shares, sizes))
    squares = ((square[0], square[0] + square[1]),)
    length = bounds[-1]
    s = Settings(
        tuple(bounds), window, min(global_tokens, length), length // 2, prefixes, block, squares
    )
    for name, predicate in PREDICATES.items():
        told = [[predicate(i, j, s) for j in range(length)] for i in range(length)]
        assert torch.equal(dense(name, s), torch.tensor(told)), name


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("name", patterns.expand(["all"]))
def test_layouts_hold_what_is_allowed(name, tile):
    s = catalogue.settings((0, 37, 210, 500), heads=2, tile=tile, seed=3)
    case = patterns.make(name, s)
    layout = case.build(tile)
    allowed = case.allowed(torch.arange(500))
    assert torch.equal(layout.dense(), allowed)
    assert 0 < layout.pairs <= layout.tile_area <= 500 * 500
    some = torch.tensor([0, 17, 128, 499])
    assert torch.equal(case.allowed(some), allowed[:, :, some])


@pytest.mark.parametrize(
    "name", [n for n in patterns.expand(["density", "block-global@0.2"]) if "vertical" not in n]
)
def test_densities_are_met(name):
    s = catalogue.settings((0, 4096), heads=2, tile=64)
    density = float(name.partition("@")[2])
    layout = patterns.make(name, s).build(64)
    assert layout.density == pytest.approx(density, rel=0.08)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("tile", [64, 128])
def test_vertical_slash_visits_about_its_density_in_tiles_and_single_keys(density, tile):
    s = catalogue.settings((0, 4096), tile=tile)
    layout = patterns.make(f"vertical-slash@{density}", s).build(tile)
    assert layout.gathered is not None
    assert layout.tile_density == pytest.approx(density, rel=0.35)
    singles = layout.cols >= layout.kv_tiles
    assert 0 < int(singles.sum()) < layout.cols.numel()


def test_block_random_rows_have_equal_counts_and_differ_by_head():
    s = catalogue.settings((0, 1024), heads=2, tile=64)
    layout = patterns.make("block-random@0.25", s).build(64)
    assert torch.equal(layout.ptr.diff(), torch.full((1, 2, 16), 4))
    assert not torch.equal(*layout.dense()[0])
    assert bool((layout.kinds == 0).all())


@pytest.mark.parametrize(("length", "shape"), [(1024, (32, 32)), (1000, (25, 40)), (61, (1, 61))])
def test_a_neighborhood_is_of_the_squarest_grid(length, shape):
    seen = dense("neighborhood@0.1", catalogue.settings((0, length))).reshape(*shape, *shape)
    sides = [max(1, round(n * 0.1**0.5)) for n in shape]
    assert torch.equal(seen.sum((2, 3)), torch.full(shape, sides[0] * sides[1]))
    assert bool(torch.einsum("abab->ab", seen).all())
    rows = seen.any(3).sum(2)  # a rectangle: as many rows of the grid as its side
    assert torch.equal(rows, torch.full(shape, sides[0]))


def test_the_seed_alone_decides_what_is_drawn():
    s = catalogue.settings((0, 300, 1024), heads=2, seed=5)
    other = catalogue.settings((0, 300, 1024), heads=2, seed=6)
    for name in ("block-random@0.2", "variable-blocks@0.5", "random-eviction", "hash-sparse"):
        assert torch.equal(dense(name, s), dense(name, s))
        assert not torch.equal(dense(name, s), dense(name, other)), name


def test_groups_and_names():
    every = patterns.expand(["all"])
    assert len(every) == len(set(every))
    assert {"full", "causal", "window@0.1"} <= set(patterns.expand(["targets"]))
    assert patterns.expand(["causal", "window@0.10", "causal"]) == ["causal", "window@0.1"]
    assert "vertical-slash@0.5" not in every


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("causl", "did you mean 'causal'"),
        ("window", "window@0.1"),
        ("window@2", "between 0 and 1"),
        ("causal@0.2", "is not known"),
        ("vertical-slash@0.5", "at most half of all pairs"),
    ],
)
def test_bad_names_are_refused(name, said):
    with pytest.raises(InputError, match=said):
        patterns.expand([name])
