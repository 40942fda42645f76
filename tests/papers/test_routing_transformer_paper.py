"""The Routing Transformer's miniature: its task, its measures, and that every cell's path runs."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from foveate.papers import routing_transformer as paper
from foveate.papers.harness import Trial
from foveate.papers.tasks.base import IGNORED


def test_questions_ask_for_what_was_stored():
    task = paper.Stores(held=16)
    assert task.vocab == 25 * 9
    batch = task.batch(0, 0, 32)
    keys, values = batch.inputs // 9, batch.inputs % 9
    asked = batch.targets != IGNORED
    for row in range(32):
        stores = {int(k): int(v) for k, v in zip(keys[row, :32], values[row, :32]) if k}
        assert len(stores) == 8
        assert asked[row].nonzero()[:, 0].min() >= 96
        assert asked[row].sum() == 8
        for at in asked[row].nonzero()[:, 0].tolist():
            assert values[row, at] == 0
            assert batch.targets[row, at] == stores[int(keys[row, at])] - 1
        noise = ~asked[row] & (keys[row] == 0)
        assert (values[row][noise] > 0).all()
        assert noise.sum() == 128 - 16


def test_divergence_of_distributions():
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 0.0]])
    q = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    found = paper.jsd(p, q)
    m = (p + q)[2] / 2
    third = 0.5 * sum(x * math.log(x / y) for x, y in zip(p[2].tolist(), m.tolist()))
    third += 0.5 * sum(x * math.log(x / y) for x, y in zip(q[2].tolist(), m.tolist()))
    torch.testing.assert_close(found, torch.tensor([math.log(2), 0.0, third]))


@pytest.mark.parametrize("cell", paper.ARMS)
def test_every_arm_runs(cell, tmp_path):
    torch.manual_seed(0)
    trial = Trial(cell, 0, quick=True, tuned=2e-3, folder=tmp_path / "checkpoints")
    found = paper.run(trial)[cell]
    assert {"accuracy", "early", "validation", "curve"} <= set(found)
    if cell == "routing":
        assert found["pairs"] == 8 * (16 * 15 / 2 + 1) / (128 * 129 / 2)
        assert 0 <= found["JSD local, local"] <= math.log(2)


def test_arms_differ_in_their_heads_alone():
    sizes = paper.Sizes(2, 48, 4, 128, 8)
    counts = set()
    for text in paper.ARMS.values():
        model = paper.Model(paper.Stores(), text, sizes)
        counts.add(sum(p.numel() for p in model.parameters()))
        routed = [part.routed for part in paper._routed(model)]
        wanted = {"local": [0, 0], "full": []}.get(
            next(arm for arm, t in paper.ARMS.items() if t == text), [2, 2]
        )
        assert routed == wanted
    assert len(counts) == 1
