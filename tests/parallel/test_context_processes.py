"""The same over processes: gloo equals the threads' simulation, dead ranks are told of."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
from sequences import NAMES, check_equal, on_ranks, one_rank, problem, this_rank

from foveate.ops import causal, documents, sinks, window
from foveate.parallel.context import GroupLinks, LinkError
from foveate.parallel.spawn import Place, run

LENGTH, BOUNDS = 90, (0, 17, 18, 61, 90)
CASES = [
    (2, "ulysses", "zigzag", "causal"), (2, "ring", "striped", "sliding"),
    (3, "ring", "zigzag", "causal"), (3, "magi(stages=2)", "by-work(5)", "document"),
    (4, "ring(window=2)", "document-zigzag", "document"), (4, "all-gather", "zigzag", "sliding"),
    (4, "usp(ulysses=2)", "zigzag", "document"), (4, "magi", "contiguous", "document"),
    (8, "loongtrain(ulysses=2, window=2)", "zigzag", "causal"), (8, "ring", "zigzag", "full"),
]  # fmt: skip
MASKS = {
    "full": None,
    "causal": causal(),
    "document": causal() & documents(BOUNDS),
    "sliding": causal() & (window(13, 0) | sinks(2)),
}


def every_case(place: Place) -> dict:
    """One rank of eight; the smaller groups are its first ranks."""
    groups = {n: torch.distributed.new_group(list(range(n))) for n in (2, 3, 4, 8)}
    found = {}
    for number, (n, scheme, sharding, mask) in enumerate(CASES):
        if place.rank < n:
            p = problem(LENGTH, dtype=torch.float32 if number % 3 == 0 else torch.float64)
            found[number] = this_rank(groups[n], p, scheme, sharding, MASKS[mask])
            del found[number]["sharding"]
    return found


def test_oracle_9_processes_equal_the_simulation_and_one_rank():
    names = [f"rank-{r}" for r in range(8)]
    got = run(every_case, names, timeout=300)
    for number, (n, scheme, sharding, mask) in enumerate(CASES):
        p = problem(LENGTH, dtype=torch.float32 if number % 3 == 0 else torch.float64)
        local = on_ranks(n, p, scheme, sharding, MASKS[mask])
        ours = [got[names[r]][number] | {"sharding": local[0]["sharding"]} for r in range(n)]
        check_equal(ours, one_rank(p, MASKS[mask]), p["q"].dtype)
        for one, other in zip(ours, local):
            for name in (*NAMES, "forward", "backward"):
                same = one[name] == other[name]
                assert same if isinstance(same, bool) else bool(same.all()), (scheme, name)


SURVIVED = ("ring", "all-gather", "ulysses", "usp(ulysses=2)", "magi")
SECONDS = 5


def one_dies(place: Place) -> dict[str, tuple[str, float]]:
    """The last rank is gone before the second attention: what others hear, after how long."""
    p = problem(LENGTH)
    every = [0, 1, 2, 3]
    groups = {scheme: torch.distributed.new_group(every) for scheme in SURVIVED}
    links = {scheme: GroupLinks(group, timedelta(seconds=SECONDS))
             for scheme, group in groups.items()}  # fmt: skip
    for scheme in SURVIVED:
        this_rank(links[scheme], p, scheme, "zigzag", causal())
    if place.rank == 3:
        os._exit(0)
    heard = {}
    for scheme in SURVIVED:
        start = time.monotonic()
        try:
            this_rank(links[scheme], p, scheme, "zigzag", causal())
        except LinkError as error:
            heard[scheme] = str(error), time.monotonic() - start
    return heard


def test_a_dead_rank_is_told_of_on_every_other():
    """In every scheme, in a time that the timeout bounds: two exchanges, and a slow machine."""
    from foveate.parallel.spawn import RanksError

    with pytest.raises(RanksError) as caught:
        run(one_dies, ["a", "b", "c", "d"], timeout=300, grace=200)
    assert list(caught.value.errors) == ["d"]
    for name in ("a", "b", "c"):
        heard = caught.value.results[name]
        assert set(heard) == set(SURVIVED)
        for scheme, (text, seconds) in heard.items():
            assert "of another rank in vain" in text, scheme
            assert seconds < 60, scheme  # not the group's own five minutes


def one_hangs(place: Place) -> str:
    """The last rank is there but doesn't answer."""
    links = GroupLinks(timeout=timedelta(seconds=2))
    if place.rank == 2:
        place.store.wait(["heard-0", "heard-1"])
        return "late"
    try:
        this_rank(links, problem(LENGTH), "ring", "zigzag", causal())
    except LinkError as error:
        return str(error)
    finally:
        place.store.set(f"heard-{place.rank}", "1")
    raise AssertionError("nobody noticed")


def test_a_rank_that_hangs_is_told_of_within_the_timeout():
    found = run(one_hangs, ["a", "b", "c"], timeout=300)
    assert found["c"] == "late"
    for name in ("a", "b"):
        assert "of 3 waited for kv of another rank in vain" in found[name]
