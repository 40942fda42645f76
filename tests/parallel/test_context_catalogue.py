"""Every scheme with every mask of the benchmark's catalogue, in the sharding that turns up."""

from __future__ import annotations

import pytest
import torch
from sequences import check_equal, on_ranks, one_rank, problem

from foveate.ops import Layout
from foveate.parts.longcontext import names, seen_by, settings

BOUNDS = (0, 21, 24, 25, 58, 75)
SCHEMES = [
    (3, "ring"), (4, "ring(window=2)"), (2, "all-gather"), (4, "ulysses"), (4, "usp(ulysses=2)"),
    (8, "loongtrain(ulysses=2, window=2)"), (3, "magi"), (4, "magi(stages=3)"),
]  # fmt: skip
SHARDINGS = ("zigzag", "document-zigzag", "striped", "by-work(8)", "contiguous")


@pytest.fixture(scope="module")
def answers():
    p = problem(BOUNDS[-1], dim=(8, 8), batch=1)
    found = {}
    for name in names():
        seen = seen_by(name, settings(BOUNDS, heads=4, tile=8))
        given = {"layout": seen} if isinstance(seen, Layout) else {"mask": seen}
        found[name] = (given, one_rank(p, **given))
    return p, found


@pytest.mark.parametrize("rest", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("ranks", "scheme"), SCHEMES)
def test_oracle_1_every_mask_of_the_catalogue(ranks, scheme, rest, answers):
    """Each mask with two of the schemes, and the slow half with all others."""
    p, found = answers
    assert len(found) == 24
    first = SCHEMES.index((ranks, scheme))
    for number, (name, (given, want)) in enumerate(found.items()):
        if ((number + first) % 4 != 0) != rest:
            continue
        sharding = SHARDINGS[(number + first) % len(SHARDINGS)]
        try:
            check_equal(on_ranks(ranks, p, scheme, sharding, **given), want, torch.float64)
        except AssertionError as error:
            raise AssertionError(f"{name}, {sharding}: {error}") from error
