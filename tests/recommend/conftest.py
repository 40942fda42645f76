"""A small data set in which what is known of items tells who likes them."""

from __future__ import annotations

import pytest
import torch

from foveate.recommend.dataset import Dataset


def made(seed: int = 0, users: int = 40, items: int = 30) -> Dataset:
    """Item i has the attribute i mod 5; user u likes items of the attribute u mod 5."""
    random = torch.Generator().manual_seed(seed)
    draws = torch.rand(users, items, generator=random)
    draws[torch.arange(users)[:, None] % 5 != torch.arange(items) % 5] = 0
    order = draws.argsort(1, descending=True)
    pairs = [(u, int(i)) for u in range(users) for i in order[u, :5]]
    part = torch.tensor(pairs).reshape(users, 5, 2)
    known = torch.tensor([(i, 0, items + i % 5) for i in range(items)]
                         + [(i, 1, items + 5 + i // 10) for i in range(items)])  # fmt: skip
    return Dataset(
        "made", users, items, items + 8, 2, part[:, :3].flatten(0, 1), part[:, 3], part[:, 4],
        known, {u: f"user {u}" for u in range(users)},
        {i: f"item {i}" for i in range(items)}, {0: "kind", 1: "shelf"},
    )  # fmt: skip


@pytest.fixture
def data() -> Dataset:
    return made()
