"""The miniatures of attn-smoe and random-features: every cell's path, and what their data is."""

from __future__ import annotations

import math

import pytest
import torch

from foveate import papers
from foveate.papers.harness import Trial
from foveate.papers.tasks.base import IGNORED, Batch, generator

pytest.importorskip("transformers")
from foveate.papers import attn_smoe, random_features  # noqa: E402


def found_by(paper, cell, tmp_path, seed=0):
    torch.manual_seed(0)
    return paper.run(Trial(cell, seed, quick=True, folder=tmp_path / "checkpoints"))


def test_every_cell_of_attn_smoe_gives_what_its_checks_read(tmp_path):
    paper = papers.load("attn-smoe")
    found = {}
    for cell in paper.cells:
        found |= found_by(paper, cell, tmp_path / cell)
    assert set(found) == {*paper.baseline, *paper.ours}
    for check in (*paper.checks, *paper.needs):
        assert math.isfinite(check.figure(found))
    wanted = {"loss", "attacked", "entropy", "load unevenness", "changed 50%", "curve"}
    assert wanted <= set(found["attention, bytes"])
    more = {a: found[a]["cache"] - found["SMoE, bytes"]["cache"] for a in attn_smoe.BYTES}
    # What a router keeps of a token is told too: E, and D by similarity.
    assert list(more.values()) == [0, 8 + 96, 8]
    for arm in attn_smoe.ARMS:
        assert 0 <= found[arm]["changed 80%"] <= 1
        assert 0 < found[arm]["entropy"] <= math.log(8) + 1e-6
    assert found["random router, averaged"]["entropy"] > found["random router"]["entropy"]


def test_specialists_are_linear_in_their_cluster_and_of_two_clusters_a_sequence():
    world = attn_smoe.World(3)
    centres, maps = world.parts
    x, y = world.draw(5, "test")
    assert x.shape == y.shape == (5, 24, 16)
    by_cluster = torch.einsum("bld,cde->blce", x, maps)
    hit = torch.isclose(by_cluster, y[:, :, None], atol=1e-5).all(-1)  # (5, 24, clusters)
    assert hit.sum(-1).eq(1).all()
    assert hit.any(1).sum(-1).eq(2).all()
    away = x - centres[hit.float().argmax(-1)]
    assert away.std().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(world.draw(5, "test")[0], x)
    assert not torch.equal(world.draw(5, "train")[0], x)
    assert not torch.equal(attn_smoe.World(4).draw(5, "test")[0], x)


def test_specialists_model_is_the_sum_over_its_chosen_experts():
    torch.manual_seed(0)
    model = attn_smoe.Specialists("similarity-smoe(tau=4.0)")
    x = torch.randn(2, 6, 16)
    y, _ = model(x)
    routed = model.router(x)
    assert routed.chosen.sum(-1).eq(2).all()
    torch.testing.assert_close(routed.weights.sum(-1), torch.ones(2, 6))
    b, i = 1, 4
    wanted = sum(routed.weights[b, i, e] * (x[b, i] @ model.maps[e]) for e in range(8))
    torch.testing.assert_close(y[b, i], wanted)


def test_words_are_overwritten_whole_and_not_scored():
    text = b"def long_name(a): return a + other * 2 # words, words and words again"
    ids = torch.tensor(list(text)).repeat(40, 1)
    batch = Batch(ids[:, :-1], ids[:, 1:])
    inputs, targets = attn_smoe.swapped(batch, generator("test"), 0.3)
    changed = inputs != batch.inputs
    assert 0.1 < changed.float().mean() < 0.5
    for row, before in zip(inputs.tolist(), batch.inputs.tolist()):
        one, two = bytes(row).decode(), bytes(before).decode()
        assert len(one) == len(two)
        for new, old in zip(one.replace("(", " ").split(), two.replace("(", " ").split()):
            letters = [c for c in old if c.isalpha() or c == "_"]
            assert new == old or set(new) - set(old) <= {"A"}
            assert new == old or new.count("A") >= len(letters)
    hidden = targets == IGNORED
    hit = changed | ((batch.inputs == inputs) & (inputs == ord("A")))
    assert torch.equal(hidden[:, :-1], hit[:, 1:])
    assert torch.equal(targets[~hidden], batch.targets[~hidden])


def test_every_cell_of_random_features_gives_what_its_checks_read(tmp_path):
    paper = papers.load("random-features")
    found = {}
    for cell in paper.cells:
        found |= found_by(paper, cell, tmp_path)
    assert set(found) == {*paper.baseline, *paper.ours}
    for check in paper.checks:
        assert math.isfinite(check.figure(found))
    arm = random_features.arm
    pure = random_features.PURE
    # Already at this size the attention learns the average, and the MLP doesn't.
    assert found[arm("RFA", pure)]["risk"] < 0.7 * found[arm("RFMLP", pure)]["risk"]
    assert found[arm("RFA", pure)]["n=150"] < found[arm("RFA", pure)]["n=50"]
    assert [n for n, _ in found[arm("RFA", pure)]["curve"]] == [50, 150]


def test_models_of_a_seed_share_their_data_and_their_draws():
    sizes = random_features.QUICK
    one, two = (random_features.draw(sizes, seed) for seed in (0, 1))
    assert torch.equal(random_features.draw(sizes, 0)[2].y, one[2].y)
    assert not torch.equal(one[2].y, two[2].y)
    torch.testing.assert_close(one[0].y.mean(0), torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(one[0].y.std(0), torch.ones(8, dtype=torch.float64))
    assert not (one[0].query[:1] == one[1].query).any()
