"""The miniatures of grassmann and deconstructing: their arms, what they count, all paths."""

from __future__ import annotations

import pytest
import torch

from foveate import papers
from foveate.papers.harness import Trial
from foveate.papers.tasks.base import split_of
from foveate.papers.tasks.entailment import CONTRADICTED, ENTAILED, NEUTRAL, Entailment

pytest.importorskip("transformers")


def cell(key, name, **more):
    made = papers.load(key)
    tuned = made.grid.points[0] if made.grid else None
    torch.manual_seed(0)
    return made, made.run(Trial(name, 0, quick=True, tuned=tuned, **more))


def test_entailment_by_hand():
    task = Entailment(symbols=12, premise=5, hypothesis=3, held=40)
    batch = task.batch(0, 0, 200)
    assert batch.inputs.shape == (200, 9)
    seen = set()
    for row, (label,) in zip(batch.inputs.tolist(), batch.targets.tolist()):
        premise, mark, hypothesis = set(row[:5]), row[5], set(row[6:])
        assert (len(premise), mark, len(hypothesis)) == (5, 1, 3)
        inside = len(premise & hypothesis)
        assert label == (ENTAILED if inside == 3 else CONTRADICTED if inside == 0 else NEUTRAL)
        assert min(premise | hypothesis) >= 2
        assert max(premise | hypothesis) < task.vocab
        seen.add(inside)
    assert seen == {0, 1, 2, 3}
    for split, number in (("validation", 1), ("test", 2)):
        for held in task.held_out(split, 16):
            assert (split_of(held.inputs) == number).all()
    assert (split_of(batch.inputs) == 0).all()
    assert torch.equal(task.batch(0, 0, 200).inputs, batch.inputs)


def test_labels_are_told_by_nothing_but_the_relation():
    """Neither half alone says anything: every symbol is as common in each place for each label."""
    task = Entailment(symbols=8, premise=3, hypothesis=2)
    drawn = task.draw(30_000, torch.Generator().manual_seed(0))
    for label in range(3):
        rows = drawn.inputs[drawn.targets[:, 0] == label]
        assert len(rows) == pytest.approx(10_000, rel=0.05)
        for place in (0, 2, 4, 5):
            counts = rows[:, place].bincount(minlength=10)[2:].float()
            assert (counts / len(rows) - 1 / 8).abs().max() < 0.02


def test_grassmann_counts():
    made, found = cell("grassmann", "cost")
    ours = found["Grassmann"]
    assert ours["products a token"] == 2 * 256 * 32 + 2 * 496 * 256 + 4 * 256 * 256
    exact = {check.name: check for check in made.checks if check.exact}
    assert len(exact) == 3
    for name in ("products a token differ by length", "sizes of the ring"):
        assert exact[name].verdict([found]).value == "holds"


def test_grassmann_arms_are_of_equal_size():
    from foveate.papers.grassmann import AS_THE_PAPER, MODELS, SIZES
    from foveate.papers.training.language import language_model

    counts = {
        arm: sum(p.numel() for p in language_model(SIZES, mixer=mixer, **AS_THE_PAPER).parameters())
        for arm, mixer in MODELS.items()
    }
    for arm, count in counts.items():
        assert abs(count / counts["Transformer"] - 1) < 0.03, arm


@pytest.mark.parametrize("name", ["Grassmann A", "no mixing", "pairs: Grassmann"])
def test_grassmann_cells_run(name, tmp_path):
    _, found = cell("grassmann", name, folder=tmp_path)
    metrics = found[name]
    assert metrics["validation"] > 0
    assert metrics.get("loss", 1.0) > 0
    if name.startswith("pairs"):
        assert 0 <= metrics["accuracy"] <= 1


def test_deconstructing_arms_are_the_sheets():
    from foveate.papers.deconstructing import HYBRID, UNIFORM, composition

    assert len(UNIFORM) == len(HYBRID) == 6
    assert composition("Standard")["attention"] == ["full"] * 4
    assert composition("MLP hybrid")["mixer"] == ["deconstructed-mlp", None] * 2
    assert composition("Non-approximate")["attention"] == ["deconstructed-nonapproximate"] * 4


def test_deconstructing_cells_run(tmp_path):
    made, found = cell("deconstructing", "FixedSeqQK hybrid", folder=tmp_path / "a")
    assert set(found) == {"FixedSeqQK hybrid", "FixedSeqQK skip"}
    assert found["FixedSeqQK hybrid"]["loss"] != found["FixedSeqQK skip"]["loss"]
    _, uniform = cell("deconstructing", "Approximate", folder=tmp_path / "b")
    assert set(uniform) == {"Approximate"}
    _, timed = cell("deconstructing", "cost")
    assert set(timed) == {"Standard cost", "Approximate cost", "Non-approximate cost"}
    assert {*found, *uniform, *timed} <= {*made.baseline, *made.ours}
