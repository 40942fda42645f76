"""The catalogue's masks, their slices and their column intervals say the same (oracle 4)."""

from __future__ import annotations

import pytest
import torch

from foveate.ops import Layout, strided
from foveate.ops.errors import InputError
from foveate.parts.longcontext import FIXED, Settings, column_intervals, counted, row_counts, slices

EXAMPLE = Settings((0, 5, 9, 16), 2, 2, 6, (2, 1, 3), 2, ((4, 7),))


def drawn(seed: int) -> Settings:
    g = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    sizes = [number(1, 12) for _ in range(number(1, 5))]
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    n = bounds[-1]
    lo = number(0, n)
    return Settings(
        tuple(bounds), number(0, n + 3), number(1, n + 1), number(0, n + 1),
        tuple(number(0, size + 1) for size in sizes), number(1, 6), ((lo, number(lo, n + 1)),),
    )  # fmt: skip


def test_oracle_4_slices_and_column_intervals_say_what_the_mask_says():
    written = 0
    for s in (EXAMPLE, *(drawn(seed) for seed in range(12))):
        n = s.length
        for name, make in FIXED.items():
            if name == "hash-sparse":
                continue
            seen = make(s).dense(n, n)[0, 0]
            told = Layout.from_slices(slices(name, s), n, n, 8)
            assert torch.equal(told.dense()[0, 0], seen), (name, s)
            form = column_intervals(make(s), n)
            assert torch.equal(Layout.from_column_intervals(*form, n, 8).dense()[0, 0], seen), name
            written += 1
    assert written == 13 * 13


def test_oracle_4_column_intervals_of_the_worked_example():
    form = {name: column_intervals(FIXED[name](EXAMPLE), 16) for name in FIXED}
    assert form["causal-document"].lts.tolist() == [5] * 5 + [9] * 4 + [16] * 7
    assert form["causal-document"].lte.tolist() == [16] * 16
    assert form["shared-question"].lts.tolist() == [16] * 5 + [9] * 4 + [16] * 7
    assert form["causal-blockwise"].lts.tolist() == [5] * 5 + [16] * 11
    assert form["causal-blockwise"].lte.tolist() == [9] * 5 + [16] * 11
    assert form["prefix-document"].ute.tolist() == [
        0, 0, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 15
    ]  # fmt: skip
    for name in ("causal-document", "shared-question", "causal-blockwise"):
        assert form[name].ute.tolist() == list(range(16))
        assert not form[name].uts.any()


def test_forms_that_dont_exist_are_refused():
    with pytest.raises(InputError, match="several stretches"):
        column_intervals(strided(2, axis="query"), 8)
    with pytest.raises(InputError, match="drawn"):
        slices("hash-sparse", EXAMPLE)


def test_row_counts_are_the_masks():
    for s in (EXAMPLE, *(drawn(seed) for seed in range(12))):
        for name in counted():
            rows = FIXED[name](s).dense(s.length, s.length)[0, 0].sum(1)
            assert torch.equal(row_counts(name, s), rows), (name, s)
    assert set(counted()) == set(FIXED) - {"qk-sparse", "hash-sparse"}
