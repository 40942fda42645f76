"""Every scheme on ranks that are threads of this process, against the reference op on one rank."""

from __future__ import annotations

import pytest
import torch
from sequences import check_equal, one_rank, problem, this_rank

from foveate.ops import Layout, blocks, causal, documents, padding, prefix, sinks, window
from foveate.ops.errors import InputError
from foveate.parallel.context import ContextParallel, run_local

LENGTH = 203  # divides by none of the numbers of ranks
BOUNDS = (0, 37, 38, 140, 203)
MASKS = {
    "full": None,
    "causal": causal(),
    "document": causal() & documents(BOUNDS),
    "full-document": documents(BOUNDS),
    "sliding": causal() & (window(19, 0) | sinks(3)),
    "prefix": causal() | prefix(50),
    "empty-rows": causal() & ~window(30, -1),
}
SCHEMES = [
    (2, "ring"), (4, "ring"), (4, "ring(window=2)"), (4, "ring(window=1)"), (3, "ring(overlap=False)"),
    (2, "all-gather"), (4, "all-gather(groups=2)"), (2, "ulysses"), (4, "ulysses"),
    (4, "usp(ulysses=2)"), (4, "usp(ulysses=2, placement='context')"),
    (8, "loongtrain(ulysses=2, window=2)"), (3, "magi"), (4, "magi(stages=2)"), (1, "ring"),
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "scheme"), SCHEMES)
def test_oracle_1_schemes_equal_one_rank(ranks, scheme):
    p = problem(LENGTH)
    for number, (name, mask) in enumerate(MASKS.items()):
        shardings = ["contiguous", "zigzag", "striped", "by-work(16)", "document-zigzag"]
        for sharding in (shardings if name in ("causal", "document") else
                         shardings[number % 5 : number % 5 + 1]):  # fmt: skip
            found = run_local(ranks, lambda links: this_rank(links, p, scheme, sharding, mask))
            check_equal(found, one_rank(p, mask), torch.float64)
