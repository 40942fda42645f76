"""The miniatures of LUCID and of tensor attention: what they draw, count and find."""

from __future__ import annotations

import pytest
import torch

from foveate import papers
from foveate.papers.harness import Trial
from foveate.papers.harness.statistics import Verdict
from foveate.papers.tasks import IGNORED

pytest.importorskip("transformers")


def cell(key: str, name: str, tmp_path, quick=True):
    made = papers.load(key)
    torch.manual_seed(0)
    tuned = made.grid.points[0] if name in made.grid.cells else None
    return made, made.run(Trial(name, 0, quick=quick, tuned=tuned, folder=tmp_path))


# -- LUCID ----------------------------------------------------------------------------------------
def test_lucid_retrieves_as_the_pilot_did(tmp_path):
    """The spec's figures of one run with other draws: 0.25/0.98, 0.01/0.83, 0.16/0.90, 1/1."""
    _, found = cell("lucid", "retrieval", tmp_path, quick=False)
    for case, softmax, lucid in (
        ("d=64 n=256 c=2", 0.25, 0.98),
        ("d=64 n=1024 c=2", 0.01, 0.83),
        ("d=32 n=1024 c=1", 0.16, 0.90),
        ("d=64 n=1024 c=0", 1.0, 1.0),
    ):
        assert found["retrieval softmax"][case] == pytest.approx(softmax, abs=0.12)
        assert found["retrieval LUCID"][case] == pytest.approx(lucid, abs=0.12)


def test_lucid_counts_its_tiles(tmp_path):
    made, found = cell("lucid", "cost", tmp_path)
    exact = [check for check in made.checks if check.exact]
    assert len(exact) == 3
    assert all(check.verdict([found]) == Verdict.HOLDS for check in exact)
    assert found["cost LUCID"]["extra FLOPs, groups of 4"] == pytest.approx(0.25, abs=1e-3)


def test_bindings_can_be_told_from_what_stands_before():
    from foveate.papers.lucid import Bindings, Bound

    task = Bound(held=4)
    batch = task.batch(0, 0, 3)
    assert batch.inputs.shape == (3, 256)
    for ids, targets in zip(batch.inputs.tolist(), batch.targets.tolist()):
        told = {i // 65: i % 65 for i in ids[:64]}
        assert len(told) == 64
        assert max(told.values()) < 64
        assert targets[:64] == [IGNORED] * 64
        assert all(i % 65 == 64 for i in ids[64:])
        assert [told[i // 65] for i in ids[64:]] == targets[64:]
    table = Bindings(task, 64)
    assert [name for name, _ in table.named_parameters()] == ["values.weight"]
    keys = table.keys / table.keys.norm(dim=1, keepdim=True)
    alike = (keys @ keys.T).view(8, 8, 8, 8)
    assert alike.diagonal(dim1=1, dim2=3).mean() > 0.9
    assert alike[:, 0, :, 1].mean().abs() < 0.3
    ids = batch.inputs
    torch.testing.assert_close(table(ids), table.keys[ids // 65] + table.values.weight[ids % 65])


def test_lucid_trains_what_it_compares(tmp_path):
    sizes = set()
    for arm in ("softmax", "LUCID"):
        _, found = cell("lucid", f"recall {arm}", tmp_path / arm)
        figures = found[f"recall {arm}"]
        sizes.add(figures["parameters"])
        assert 0 <= figures["accuracy"] <= 1
        assert figures["steps to 90%"] == 29  # never, in 4 steps
    assert len(sizes) == 1


def test_lucid_tells_both_phases(tmp_path):
    _, found = cell("lucid", "phases", tmp_path)
    for arm in ("phases softmax", "phases LUCID"):
        assert 0 < found[arm]["Jacobian, after phase 2"] < 1
        assert found[arm]["loss, after phase 1"] < found[arm]["loss, first"] * 1.2


# -- tensor attention -----------------------------------------------------------------------------
def test_match3_draws_triples_that_add_up():
    from foveate.papers.tensor_attention import M, drawn

    tokens, there = drawn(500, "test")
    row = 3
    for i in range(8):
        sums = [int(tokens[row, i] + a + b) % M for a in tokens[row].tolist() for b in tokens[row]]
        assert bool(there[row, i]) == (0 in sums)
    assert there.float().mean() == pytest.approx(0.63, abs=0.02)
    assert not torch.equal(drawn(500, "validation")[0], tokens)


def test_match3_gives_softmax_more_parameters(tmp_path):
    sizes = {}
    for arm in ("tensor", "softmax"):
        _, found = cell("tensor-attention", arm, tmp_path)
        sizes[arm] = found[arm]["parameters"]
        assert 0.4 < found[arm]["late"] < 0.7
    assert sizes["softmax"] > sizes["tensor"]


def test_match3s_blank_token_is_no_position():
    from foveate.papers.tensor_attention import Detector, drawn

    model = Detector("tensor")
    tokens, _ = drawn(2, "test")
    logits = model(tokens)
    assert logits.shape == tokens.shape
    flipped = model(tokens.flip(1)).flip(1)  # no positions: order is nothing
    torch.testing.assert_close(flipped, logits)


def test_degrees_grow_with_the_entries(tmp_path):
    _, found = cell("tensor-attention", "degrees", tmp_path)
    order3 = [found["order 3"][f"degree B={size:g}"] for size in (0.5, 1, 1.5, 2)]
    assert order3 == sorted(order3)
    assert order3[-1] >= order3[0] + 8
    assert found["order 4"]["degree B=2"] > found["order 3"]["degree B=2"]
    assert found["order 3"]["uniform error B=0.5 g=4"] < 2e-10


def test_both_forms_are_timed(tmp_path):
    _, found = cell("tensor-attention", "time", tmp_path)
    for name in ("exact", "features"):
        assert all(found[name][f"seconds {n}"] > 0 for n in (64, 128, 256, 512, 1024))
    assert found["features"]["error 512"] < 1e-4
