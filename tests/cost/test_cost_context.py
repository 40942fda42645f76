"""The planner: volumes of the spec's table, time of a worked example, the command."""

from __future__ import annotations

import json

import pytest
import torch

from foveate.cli import main
from foveate.cost.context import Machine, candidates, cost, loads
from foveate.parallel.context import Sizes, scheme_of, volume, zigzag

MIB = 2**20


@pytest.mark.parametrize(
    ("ranks", "kv_heads", "scheme", "mib"),
    [
        (8, 8, "ulysses", 252), (8, 8, "ring", 224), (8, 8, "usp(ulysses=4)", 248),
        (16, 8, "ulysses", 300), (16, 8, "ring", 480), (16, 8, "usp(ulysses=8)", 284),
        (64, 8, "ulysses", 504), (64, 8, "ring", 2016), (64, 8, "usp(ulysses=8)", 476),
        (8, 64, "ulysses", 448), (8, 64, "ring", 1792), (8, 64, "usp(ulysses=4)", 640),
        (64, 64, "ulysses", 504), (64, 64, "ring", 16128), (64, 64, "usp(ulysses=8)", 2240),
    ],
)  # fmt: skip
def test_the_sheets_table_of_volumes(ranks, kv_heads, scheme, mib):
    """8K tokens for each GPU, 64 query heads of 128, bf16; the table leaves out the lse."""
    told = volume(scheme_of(scheme), Sizes(8192 * ranks, ranks, 64, kv_heads, 128, 128))
    sent = sum(n for what, n in told.forward.items() if what != "lse")
    assert sent * 2 == mib * MIB


def test_time_of_a_worked_example():
    """One second of computing and half a second of sending, told apart and together."""
    s, n, d, h = 1024, 4, 64, 2
    work = torch.arange(1, s + 1)
    pairs, pairs_of = s * (s + 1) / 2 / n, loads(work, zigzag(s, n))
    sent = 3 / 4 * s * 2 * h * d * 2  # bf16
    machine = Machine(4 * pairs * h * d, sent / 0.5, 1.0)
    found = cost("ring", Sizes(s, n, h, h, d, d), pairs_of, machine)
    assert (found.compute, found.exchange) == pytest.approx((1.0, 0.5))
    assert (found.apart, found.together) == pytest.approx((1.5, 1.0))
    assert found.efficiency == pytest.approx((1 / 1.5, 1.0))
    slow = Machine(machine.rate, machine.inside, machine.inside / 10, node=2)
    ring = cost("ring", Sizes(s, n, h, h, d, d), pairs_of, slow)
    assert ring.exchange == pytest.approx(5.0)
    double = cost("ring(window=2)", Sizes(s, n, h, h, d, d), pairs_of, slow)
    assert double.exchange == pytest.approx(5.0 / 3)  # one of three messages leaves its machine


def test_ulysses_shares_rows_and_heads():
    """Contiguous shares are uneven for a ring and even once Ulysses has whole rows."""
    from foveate.parallel.context import contiguous

    s, n = 512, 4
    work, sizes = torch.arange(1, s + 1), Sizes(s, n, 8, 8, 16, 16)
    machine = Machine(1.0, 1.0, 1.0)
    ring, whole = (
        cost(x, sizes, loads(work, contiguous(s, n)), machine).compute for x in ("ring", "ulysses")
    )
    assert ring / whole == pytest.approx(7 / 4, rel=0.01)  # (2 N - 1) / N


def test_candidates_can_run():
    for ranks in (1, 2, 8, 96, 1024):
        for name in candidates(ranks, 64, 8):
            scheme_of(name).check(ranks, 64)


def test_the_rate_comes_from_measured_kernels(tmp_path, capsys):
    """Twice the rate is half the computing; what wasn't measured is refused."""
    record = {"cell": {"mask": "causal", "direction": "forward"},
              "values": {"results": [{"tflops": 0.05}, {"failed": "x"}]}}  # fmt: skip
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n")
    args = ["--ranks", "4", "--per-rank", "64", "--schemes", "ring", "--json"]
    code, said = run(capsys, *args, "--measured", str(tmp_path))
    assert code == 0
    slow = json.loads(said.out)[0]["compute_seconds"]
    code, said = run(capsys, *args, "--rate", "0.1")
    assert json.loads(said.out)[0]["compute_seconds"] == pytest.approx(slow / 2)
    code, said = run(capsys, *args, "--measured", str(tmp_path), "--mask", "full")
    assert code == 2
    assert "bench kernels --masks full" in said.err


def run(capsys, *args):
    code = main(["cost", "context", *args])
    return code, capsys.readouterr()


def test_document_zigzag_is_by_document_where_the_mask_knows_any(capsys):
    """Causal blockwise too: its last document sees all, and is zig-zagged on its own."""
    for mask in ("causal-document", "causal-blockwise", "shared-question"):
        code, said = run(capsys, "--ranks", "8", "--per-rank", "4096", "--json", "--mask", mask,
                         "--documents", "short", "--schemes", "ring")  # fmt: skip
        assert code == 0
        assert json.loads(said.out)[0]["imbalance"] < 1.1, mask


def test_the_command_extrapolates_to_a_thousand_ranks(capsys):
    code, said = run(capsys, "--ranks", "8,1024", "--per-rank", "64", "--json",
                     "--mask", "causal-document", "--documents", "short")  # fmt: skip
    assert code == 0
    rows = json.loads(said.out)
    assert {row["ranks"] for row in rows} == {8, 1024}
    for row in rows:
        assert row["seconds_together"] <= row["seconds_apart"]
        assert 0 < row["efficiency_apart"] <= row["efficiency_together"] <= 1.0 + 1e-9
    code, said = run(capsys, "--ranks", "8", "--per-rank", "64")
    assert code == 0
    assert "ulysses" in said.out
    code, said = run(capsys, "--mask", "casual")
    assert code == 2
    assert "causal" in said.err
