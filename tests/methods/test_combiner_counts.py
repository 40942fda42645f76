"""Combiner's counted work: against explicit lists, against its layouts, and its growth."""

from __future__ import annotations

import combiner_reference as by
import pytest

from foveate.methods.combiner import Combiner
from foveate.methods.combiner.counts import coverage, items, near_root
from foveate.methods.combiner.fixed import Fixed, span_layout
from foveate.methods.combiner.logsparse import span_layout as log_layout
from foveate.ops.errors import InputError
from foveate.papers.combiner import FIXED, SIDE, counts
from foveate.parts.growth import exponent

LENGTHS = tuple(1024 << n for n in range(7))  # 1k to 64k


@pytest.mark.parametrize("length", [1, 2, 7, 25, 38, 64, 97])
@pytest.mark.parametrize("name", ["fixed", "logsparse", "vertical", "horizontal"])
def test_items_are_those_of_the_explicit_lists(name, length):
    lists = {
        "fixed": by.blocks(5),
        "logsparse": by.logsparse,
        "vertical": by.vertical(5),
        "horizontal": by.horizontal(5),
    }[name]
    found = [lists(i, length, True) for i in range(length)]
    counted = items(Combiner(name, size=5), length)
    assert counted.direct == sum(len(direct) for direct, _ in found)
    assert counted.spans == sum(len(spans) for _, spans in found)


def test_items_of_the_sheets_example():
    # Half of each own block, half of the blocks: the spec counts them whole.
    counted = items(Combiner(size=64), 4096)
    assert counted.direct == 64 * 64 * 65 // 2
    assert counted.spans == 64 * 64 * 63 // 2
    assert counted.summaries == 4096
    assert counted.total < 786_432


def test_layouts_visit_few_more_elements_than_items():
    for length in (1000, 4096):
        counted = items(Combiner(size=64), length)
        layout = span_layout(length, 64, -(-length // 64), True, "cpu")
        assert layout.pairs == counted.spans
        assert layout.tile_area < 1.3 * counted.spans + 16 * length
        logs = log_layout(length)
        assert logs.pairs == items(Combiner("logsparse"), length).spans
        assert logs.tile_area <= 64 * length


def test_counted_work_grows_as_the_sheet_says():
    def growth(name, **fields):
        work = [
            items(Combiner(name, size=near_root(n), clusters=near_root(n), **fields), n).total
            for n in LENGTHS
        ]
        return exponent(LENGTHS, work)

    for name in ("fixed", "vertical", "horizontal", "rowmajor", "learnable", "mixture"):
        assert growth(name) == pytest.approx(1.5, abs=0.05), name
    # L log L: between 1k and 64k its slope is that of n (1 + log2 n).
    assert 1.0 < growth("logsparse") < 1.15
    dense = [n * (n + 1) // 2 for n in LENGTHS]
    assert exponent(LENGTHS, dense) == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("name", ["fixed", "logsparse", "vertical", "horizontal", "learnable"])
def test_coverage_is_whole(name):
    assert coverage(Combiner(name, size=8), 90) == 1


def test_coverage_is_measured(monkeypatch):
    # Without its spans a query sees no more than its own block.
    monkeypatch.setattr(Fixed, "spans", lambda self, call: [])
    assert coverage(Combiner(size=8), 96) == 12 * 8 * 9 / 2 / (96 * 97 / 2)


def test_the_sparse_pattern_of_the_miniature_covers_what_the_sheet_says():
    length, size = 256, SIDE
    assert counts()[FIXED]["coverage"] == pytest.approx(
        (size / 2 + length / 2 / size) / (length / 2), rel=0.05
    )


def test_an_exponent_is_the_slope():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    with pytest.raises(InputError, match="two or more"):
        exponent([4, 4], [1, 2])
    with pytest.raises(InputError, match="above 0"):
        exponent([1, 2], [0, 2])
