"""Ranks start, answer by name, and never outlive a failure."""

import os
import time

import pytest
import torch
from torch import distributed

from foveate.ops import errors
from foveate.parallel.spawn import Place, Ranks, RanksError, run


def everything(place: Place, tensor: torch.Tensor) -> dict:
    total = tensor * (place.rank + 1)
    distributed.all_reduce(total)
    return {"name": place.name, "pid": os.getpid(), "total": total, "size": place.size}


def one_fails(place: Place) -> str:
    if place.name == "b":
        raise ValueError("no such expert")
    if place.name == "c":
        distributed.recv(torch.zeros(1), src=1)  # waits for b, who sends nothing
    return place.name


def fail_in_turn(place: Place) -> None:
    if place.name == "second":
        place.store.wait(["first"])
        time.sleep(0.05)
    place.store.set(place.name, "fails")
    raise ValueError(place.name)


def asleep(place: Place) -> None:
    place.store.set(place.name, "ready")
    time.sleep(600)


def test_results_come_back_by_name_and_the_ranks_are_one_group():
    results = run(everything, ["x", "y", "z"], (torch.tensor([1.0, 2.0]),), timeout=60)
    assert list(results) == ["x", "y", "z"]
    assert len({r["pid"] for r in results.values()} | {os.getpid()}) == 4
    for name, result in results.items():
        assert result["name"] == name
        assert result["size"] == 3
        torch.testing.assert_close(result["total"], torch.tensor([6.0, 12.0]))


def test_a_failure_is_told_by_name_and_stops_the_others():
    begun = time.monotonic()
    with pytest.raises(RanksError, match="no such expert") as caught:
        run(one_fails, ["a", "b", "c"], timeout=60, grace=1)
    assert time.monotonic() - begun < 30
    assert next(iter(caught.value.errors)) == "b"
    assert set(caught.value.errors) == {"b", "c"}
    assert caught.value.results == {"a": "a"}


def test_the_first_to_fail_stands_first_whoever_is_heard_first():
    with Ranks(fail_in_turn, ["second", "first"], timeout=60, backend=None) as ranks:
        for process in ranks.processes.values():
            process.join()
        with pytest.raises(RanksError, match="'first' first") as caught:
            ranks.wait()
    assert list(caught.value.errors) == ["first", "second"]


def test_a_killed_rank_and_one_out_of_time_are_named():
    with Ranks(asleep, ["a", "b"], timeout=60, grace=0.5, backend=None) as ranks:
        ranks.store.wait(["a", "b"])
        ranks.kill("b")
        with pytest.raises(RanksError) as caught:
            ranks.wait()
    assert list(caught.value.errors) == ["b", "a"]
    assert "SIGKILL" in caught.value.errors["b"]
    assert "after 'b' had failed: killed" in caught.value.errors["a"]
    with pytest.raises(RanksError, match="still running after 2 s: killed"):
        run(asleep, ["a"], timeout=2, backend=None)


def test_bad_names_and_times_are_refused():
    for names, timeout in ((["a", "a"], 1), ([], 1), (["a"], 0)):
        with pytest.raises(errors.InputError):
            run(asleep, names, timeout=timeout)
