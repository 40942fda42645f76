"""The benchmark's miniature runs through, and what is counted in it is as its spec says."""

from __future__ import annotations

import pytest

from foveate.papers import load
from foveate.papers.harness import Trial
from foveate.papers.longca_bench import SCHEMES, balance, plan, run


def test_counted_cells_quickly():
    paper = load("longca-bench")
    found = {}
    for cell in ("balance", "schemes", "plan"):
        found |= run(Trial(cell, 0, quick=True))
    counted = [c for c in paper.checks if c.exact or c.name.startswith("error")]
    assert len(counted) == 2 * len(SCHEMES) + 3
    for check in counted:
        assert check.verdict([found]) == "holds" or not check.exact, check.text
    for scheme in SCHEMES:
        assert found[scheme]["error"] < 1e-12
        assert found[scheme]["sent over theory"] == 1


@pytest.mark.slow
def test_balance_at_the_sheets_size():
    """The spec's pilot: zig-zag 2.13 and 1.000, per document at most 1.05, for short documents."""
    found = balance(Trial("balance", 0))
    assert found["zigzag"]["imbalance, short"] > 1.4
    assert found["zigzag"]["imbalance, one document"] < 1.001
    assert found["contiguous"]["imbalance, one document"] == pytest.approx(1.875, abs=1e-3)
    for kind in ("short", "medium", "long"):
        assert found["document zigzag"][f"imbalance, {kind}"] < 1.02
        assert found["by work"][f"imbalance, {kind}"] < 1.02
    visited = {name: one.get("tiles of 128 visited") for name, one in found.items()}
    assert visited["striped"] > visited["document zigzag"]
    planned = plan(Trial("plan", 0))
    for check in load("longca-bench").checks:
        if check.name.startswith("ms apart"):
            assert check.verdict([planned]) == "holds", check.text


def test_kernel_cell_quickly():
    found = run(Trial("kernel", 0, quick=True))
    assert found["full"]["tiles"] == 64
    assert all(one["microseconds a tile"] > 0 for one in found.values())
