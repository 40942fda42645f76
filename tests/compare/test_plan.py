"""What is measured in which order, and what a record's key depends on."""

import pytest

from foveate.compare.plan import (
    BUDGETS,
    DEFAULT_METHODS,
    FACTORS,
    Cell,
    Plan,
    entries_of,
)
from foveate.methods import make, split
from foveate.ops.errors import InputError, UnknownMethodError

RUN = {"model": "m", "weights": "w", "text_sha256": "t", "dtype": "float32", "threads": 2}


def plan(methods="full,sink-window,a-shape", lengths=(64, 128), passes=3, **run):
    return Plan(entries_of(split(methods)), lengths, passes, RUN | run)


def test_every_cell_is_in_exactly_one_round_next_to_dense():
    made = plan()
    rounds = list(made.rounds(set()))
    cells = [cell for round_ in rounds for cell in round_.cells]
    assert len(cells) == len(set(cells)) == 3 * 2 * 3
    assert set(cells) == set(made.cells())
    assert all(len({(c.length, c.number) for c in r.cells}) == 1 for r in rounds)


def test_short_lengths_come_first_and_the_order_turns_round():
    rounds = list(plan().rounds(set()))
    assert [r.length for r in rounds] == sorted(r.length for r in rounds)
    first = [r for r in rounds if r.length == 64][:3]
    assert [r.before.entry.key for r in first] == ["full", "sink-window", "full"]
    assert [r.after.entry.key for r in first] == ["sink-window", "full", "sink-window"]
    alone = [r for r in rounds if r.length == 64][3:]
    assert [r.before is None for r in alone] == [False, True, False]


def test_what_is_done_is_left_out():
    made = plan()
    some = set(list(made.cells())[::2])
    left = [cell for round_ in made.rounds(some) for cell in round_.cells]
    assert set(left) == set(made.cells()) - some
    assert not list(made.rounds(set(made.cells())))


@pytest.mark.parametrize("name", list(RUN))
def test_a_key_depends_on_the_run(name):
    cell = next(plan().cells())
    assert plan().key(cell) != plan(**{name: "other"}).key(cell)
    assert plan().key(cell) == plan().key(cell)


def test_a_key_depends_on_all_hyper_parameters_also_those_at_their_defaults():
    def key(method):
        made = plan(method)
        return made.key(Cell(made.entries[0], 64, 0))

    assert key("sink-window(window=100)") != key("sink-window(window=101)")
    assert "sinks" in entries_of(["sink-window"])[0].parameters


def test_the_same_method_twice_is_measured_once():
    names = ["sink-window", "sink-window( window =1024 )", "sink-window(sinks=4)"]
    assert [e.name for e in entries_of(names)] == ["sink-window"]
    assert [e.name for e in entries_of(names[1:])] == ["sink-window(window=1024)"]


def test_the_defaults_are_five_methods_that_exist():
    entries = entries_of(split(DEFAULT_METHODS))
    assert len({entry.key for entry in entries}) == 5
    assert entries[0].name == "full"
    for entry in entries:
        assert make(entry.name) == entry.method()
        assert entry.reserved


def test_unknown_methods_and_hyper_parameters_are_named():
    with pytest.raises(UnknownMethodError, match="'sink-window'"):
        entries_of(["sinkwindow"])
    with pytest.raises(InputError, match="window"):
        entries_of(["sink-window(windw=3)"])


def test_a_sweep_scales_the_budget_and_nothing_else():
    for key, fields in BUDGETS.items():
        entries = entries_of([key], sweep=True)
        base = entries_of([key])[0].parameters
        assert len(entries) == len(FACTORS)
        for entry, factor in zip(entries, FACTORS):
            for name, value in entry.parameters.items():
                whole = isinstance(base[name], int) and not isinstance(base[name], bool)
                scaled = base[name] if name not in fields else base[name] * factor
                assert value == (round(scaled) if whole else scaled)
    shares = [
        e.parameters["fraction"] for e in entries_of(["block-sparse(fraction=0.4)"], sweep=True)
    ]
    assert shares == [0.1, 0.2, 0.4, 0.8]
    assert len(entries_of(["full"], sweep=True)) == 1
