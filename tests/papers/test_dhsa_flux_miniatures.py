"""The miniatures of DHSA and Flux: their data, and that every cell's path runs."""

from __future__ import annotations

import pytest
import torch

from foveate.methods.dhsa.boundaries import equal
from foveate.papers import dhsa
from foveate.papers.harness import Trial
from foveate.papers.tasks.base import IGNORED, split_of
from foveate.papers.tasks.routed import FarRecall, Mixed, NearText

pytest.importorskip("transformers")

from foveate.papers import flux  # noqa: E402


# -- DHSA -----------------------------------------------------------------------------------------
def test_segments_are_a_topic_and_noise():
    keys, queries, bounds = dhsa.drawn(600, 64, 0.0, torch.Generator().manual_seed(0))
    assert keys.shape == (600, 64)
    assert (bounds[0], bounds[-1], len(queries)) == (0, 600, len(bounds) - 1)
    assert bounds.diff()[:-1].min() >= 2
    assert bounds.diff()[:-1].max() <= 128
    for start, end in zip(bounds[:-1], bounds[1:]):
        assert (keys[start:end] == keys[start]).all()
    topics = keys[bounds[:-1]] * 2
    torch.testing.assert_close(topics @ topics.T, torch.eye(len(topics)), atol=1e-5, rtol=0)
    many, _, cut = dhsa.drawn(20_000, 16, 1.0, torch.Generator().manual_seed(0))
    assert len(cut) <= 16 + 1 + 1
    assert len(many) == 20_000


def test_without_noise_true_chunks_are_found_whole():
    keys, queries, bounds = dhsa.drawn(512, 64, 0.0, torch.Generator().manual_seed(3))
    queries = keys[bounds[:-1]]
    for pooling in ("norm", "mean", "sum"):
        assert dhsa.kept_share(keys, queries, bounds, bounds, pooling, 128) == 1.0
    # A budget that no chunk needs: what is kept of the segment is what the best blocks hold of it.
    halves = torch.tensor([0, 256, 512])
    assert dhsa.kept_share(keys, queries, bounds, halves, "mean", 512) == 1.0
    by_hand = []
    scores = queries @ torch.stack([keys[c : c + 64].mean(0) for c in range(0, 512, 64)]).T
    for i, (lo, hi) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist())):
        best = scores[i].argsort(descending=True, stable=True)[:2].tolist()
        inside = sum(t // 64 in best for t in range(lo, hi))
        by_hand.append(inside / min(hi - lo, 128))
    ours = dhsa.kept_share(keys, queries, bounds, equal(512, 64), "mean", 128)
    assert ours == pytest.approx(sum(by_hand) / len(by_hand))
    assert dhsa.even(10, 3).tolist() == [0, 3, 6, 10]


def test_the_segments_claim_at_its_own_size():
    found = dhsa.run(Trial("segments", 0))
    assert found[dhsa.OURS]["kept"] > found[dhsa.FIXED]["kept"] + 0.05
    assert found[dhsa.OURS]["kept"] > found[dhsa.EVEN]["kept"] + 0.05
    assert found[dhsa.OURS]["kept"] > found[dhsa.SUM]["kept"]
    for arm in (dhsa.OURS, dhsa.FIXED, dhsa.EVEN, dhsa.MEAN):
        assert found[arm + dhsa.LESS]["kept"] > found[arm]["kept"]


def test_the_predictor_is_trained_and_used():
    found = dhsa.run(Trial("predicted", 0, quick=True))
    assert set(found) == {dhsa.PREDICTED, dhsa.CLEAN, dhsa.CLEAN_FIXED, dhsa.CLEAN_EVEN}
    assert 0 <= found[dhsa.PREDICTED]["f1"] <= 1
    assert found[dhsa.CLEAN]["kept"] > found[dhsa.CLEAN_FIXED]["kept"]


def test_recall_of_attention_that_sees_everything_alike_is_counted():
    watched = dhsa.Watched(frozenset({0}), 512)
    watched._measure(torch.zeros(1, 4, 512, 8), torch.zeros(1, 2, 512, 8), 1.0)
    # Row i has mass 1 / (i + 1) on each key; an arm keeps 64 keys for a block of 16 rows, of which
    # a row sees those that aren't later than itself.
    for (arm, forced), (share,) in watched.shares.items():
        assert 0 < share < 1
        if arm == "last 256" and not forced:
            rows = torch.arange(128, 512)
            first = (rows // 16 + 1) * 16 - 64
            expected = ((rows - first + 1) / (rows + 1.0)).mean()
            assert share == pytest.approx(float(expected), rel=1e-4)
    plain = {arm: share for (arm, forced), (share,) in watched.shares.items() if not forced}
    assert plain["best"] >= max(plain.values()) - 1e-6


# -- Flux -----------------------------------------------------------------------------------------
def test_recall_asks_for_what_stood_far_away():
    batch = next(FarRecall(held=64).held_out("test", 64))
    assert (batch.inputs[:, 0] == 0).all()
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist()):
        asked = [i for i, t in enumerate(targets) if t != IGNORED]
        assert asked == [56, 58, 60, 62]
        for i in asked:
            before = [j for j in range(1, 42) if row[j] == row[i]]
            assert len(before) == 1
            assert row[before[0] + 1] == targets[i] == row[i + 1]
        assert len({row[i] for i in asked}) == 4
        assert all(2 <= t < 16 for t in row[43:56])


def test_text_is_the_chain_and_each_token_is_predicted():
    task = NearText(held=40)
    batch = task.batch(0, 0, 400)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert (batch.inputs[:, 0] == 1).all()
    assert (split_of(batch.inputs) == 0).all()
    pairs = torch.zeros(46, 46)
    before, after = batch.targets[:, :-1].flatten() - 2, batch.targets[:, 1:].flatten() - 2
    pairs.index_put_((before, after), torch.ones(len(before)), accumulate=True)
    seen = pairs.sum(1)
    gap = (pairs / seen[:, None] - task.odds).abs().sum(1)
    assert float((gap * seen).sum() / seen.sum()) < 0.35
    mixed = Mixed().batch(0, 0, 32)
    assert (mixed.inputs[:24, 0] == 0).all()
    assert (mixed.inputs[24:, 0] == 1).all()


def test_flux_tells_every_arm_and_puts_the_model_back(tmp_path):
    found = flux.run(Trial("model", 0, quick=True, folder=tmp_path))
    assert set(found) == {*flux.PAPER.baseline, *flux.PAPER.ours}
    assert found["dense"]["full on text"] == found["dense"]["keys read on text"] == 1
    assert found["sparse"]["full on recall"] == 0
    assert found["sparse"]["keys read on recall"] == pytest.approx(10 / 64)
    assert found["full in layer 1"]["full on recall"] == pytest.approx(1 / 3)
    # Routers begin almost surely full, and without noise they are.
    assert found["routed"]["full on recall"] == found["routed"]["full on text"] == 1
    assert found["routed"]["loss of text"] == pytest.approx(
        found["dense"]["loss of text"], rel=1e-5
    )


def test_losses_are_means_over_sequences():
    logits, targets = torch.randn(2, 6, 9), torch.full((2, 6), IGNORED)
    targets[0, 2], targets[1] = 4, torch.arange(6)
    expected = [
        torch.nn.functional.cross_entropy(logits[0, 2:3], targets[0, 2:3]),
        torch.nn.functional.cross_entropy(logits[1], targets[1]),
    ]
    torch.testing.assert_close(flux.entropies(logits, targets), torch.stack(expected))
