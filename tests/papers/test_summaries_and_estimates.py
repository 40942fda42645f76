"""The miniatures of Combiner and SEA: their data, their arms, and their quick path."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from foveate import papers
from foveate.papers import combiner, sea
from foveate.papers.harness import Trial
from foveate.papers.tasks.base import split_of


def figures(key):
    """Every cell of a miniature at its quick size."""
    made = papers.load(key)
    found: dict = {}
    for cell in made.cells:
        torch.manual_seed(0)
        for arm, values in made.run(Trial(cell, 0, quick=True, tuned=2e-3)).items():
            found.setdefault(arm, {}).update(values)
    return made, found


@pytest.mark.parametrize("key", ["combiner", "sea"])
def test_the_quick_path_has_a_figure_for_every_check(key):
    made, found = figures(key)
    for check in (*made.checks, *made.needs):
        (value,) = check.values([found])
        assert value == value, check.name
        if check.exact:
            assert check.verdict([found]) == "holds", check.name
    assert set(made.baseline) | set(made.ours) <= set(found)


def test_images_are_gradients_under_rectangles_and_begin_with_their_token():
    task = combiner.Images(held=32)
    batch = task.batch(0, 0, 40)
    assert batch.inputs.shape == batch.targets.shape == (40, 256)
    assert (batch.inputs[:, 0] == 8).all()
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.targets.max() == 7
    assert (split_of(batch.inputs) == 0).all()
    assert torch.equal(task.batch(0, 0, 40).inputs, batch.inputs)
    plain = combiner.Images(rectangles=0).batch(1, 0, 4).targets.view(4, 16, 16)
    steps = (plain[:, 1:] - plain[:, :-1]) % 8
    assert set(steps.unique().tolist()) == {0, 1}


def test_sparse_bases_see_what_they_say():
    torch.manual_seed(0)
    model = combiner.model_of(combiner.AXIAL)
    q = torch.randn(1, 4, 256, 16)
    ctx = combiner.Context(mask=combiner.causal())
    seen = model.model.blocks[0].attention.attention.layout(q, q, q, ctx).dense()[0, 0]
    i, j = torch.arange(256)[:, None], torch.arange(256)
    cross = (i // 16 == j // 16) | (i % 16 == j % 16)
    assert torch.equal(seen, cross & (j <= i))
    model = combiner.model_of(combiner.FIXED)
    seen = model.model.blocks[0].attention.attention.layout(q, q, q, ctx).dense()[0, 0]
    assert torch.equal(seen, ((i // 16 == j // 16) | (j % 16 == 15)) & (j <= i))


def test_all_arms_start_from_the_same_weights():
    held = []
    for arm in combiner.ARMS:
        torch.manual_seed(0)
        held.append(combiner.model_of(arm).state_dict())
    assert all(one.keys() == held[0].keys() for one in held)
    assert all(torch.equal(one[name], held[0][name]) for one in held for name in one)


def test_the_performer_arm_is_linear_attention_of_44_features():
    method = sea.Performer(16)
    assert method.w.shape == (44, 16)
    q, k, v = torch.randn(3, 1, 2, 50, 16)
    a, b = (torch.relu(x @ method.w.mT) + 1e-3 for x in (q, k))
    weights = (a @ b.mT).tril()
    torch.testing.assert_close(
        method(q, k, v).out, weights @ v / weights.sum(-1, keepdim=True), atol=1e-4, rtol=1e-4
    )
