"""The miniatures of kgat and mqsa-ted: their data, their arms, their quick path."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytest.importorskip("safetensors")

from foveate import papers
from foveate.papers import kgat, mqsa_ted
from foveate.papers.harness import Trial, environment
from foveate.recommend.pairwise import Pairwise

WHEEL = importlib.util.find_spec("recbole") is not None


@pytest.mark.parametrize("key", ["kgat", "mqsa-ted"])
def test_the_quick_path_has_a_figure_for_every_check(key, tmp_path):
    made = papers.load(key)
    found: dict = {}
    for cell in made.cells:
        if cell.startswith("films") and not WHEEL:
            continue
        torch.manual_seed(0)
        trial = Trial(cell, 0, quick=True, tuned=made.grid.points[0], folder=tmp_path / cell)
        for arm, values in made.run(trial).items():
            found.setdefault(arm, {}).update(values)
    for check in (*made.checks, *made.needs):
        if "films" in check.name and not WHEEL:
            continue
        (value,) = check.values([found])
        assert value == value, check.name
    if WHEEL:
        assert set(made.baseline) | set(made.ours) <= set(found)
        assert made.data().count("MovieLens") == 1


def test_figures_depend_on_the_code_that_trains_and_judges(monkeypatch):
    seen = []
    monkeypatch.setattr(environment, "source_digest", lambda files: seen.extend(files) or "")
    environment.code_digest.__wrapped__()
    named = {"/".join(path.parts[-2:]) for path in seen}
    assert {
        f"recommend/{name}.py" for name in ("loop", "pairwise", "sequential", "metrics")
    } < named


def test_made_items_have_their_attributes_and_users_their_likes():
    data = kgat.made(3)
    assert [len(x) // 400 for x in (data.train, data.validation, data.test)] == [6, 2, 4]
    item, relation, entity = data.knowledge.unbind(1)
    for r, each in ((0, 2), (1, 6)):
        own = relation == r
        assert item[own].bincount().tolist() == [each] * 400
        assert (entity[own] - 400 - 20 * r).unique().tolist() == list(range(20))
    of = [set(entity[(item == i) & (relation == 0)].tolist()) for i in range(400)]
    pairs = torch.cat((data.train, data.validation, data.test))
    assert len(data.numbers(pairs).unique()) == len(pairs)
    for user in range(0, 400, 40):
        mine = [of[i] for i in pairs[pairs[:, 0] == user, 1].tolist()]
        kinds = range(400, 420)
        assert any(all({a, b} & has for has in mine) for a in kinds for b in kinds)
    assert torch.equal(kgat.made(3).train, data.train)
    assert not torch.equal(kgat.made(4).train, data.train)


def test_arms_differ_in_what_they_say_and_nothing_else():
    point = kgat.PAPER.grid.points[1]
    held = {name: kgat.setting_of(arm, point) for name, arm in kgat.ARMS.items()}
    ours, equal = held["made KGAT"], held["made equal"]
    assert (ours.recipe.attention, equal.recipe.attention) == (True, False)
    assert ours.translation
    assert equal.translation
    for name, setting in held.items():
        assert (setting.lr, setting.decay, setting.batch) == (*point, 1024), name
        assert setting.judge == "ndcg@20"
    wide = {n: s.dim for n, s in held.items() if s.kind != "kgat"}
    assert wide == {"made BPR-MF": 96, "made FM": 96, "films BPR-MF": 176, "films FM": 176}
    data = kgat.made(0)
    alone = Pairwise(held["made users and items"], data).graph
    assert len(alone) == 2 * len(data.train)


def test_masses_are_the_attention_on_items_edges():
    data = kgat.made(0)
    trainee = Pairwise(kgat.setting_of(kgat.ARMS["made equal"], (1e-3, 0.0)), data)
    count = data.train[:, 1].bincount(minlength=400) + 8  # each item's edges
    expected = (1 / count).mean().item()
    found = kgat.masses(trainee.model)
    assert found["mass matters"] == pytest.approx(expected)
    assert found["mass noise"] == pytest.approx(expected)


def test_choices_follow_tastes_and_successors():
    data = mqsa_ted.made(1)
    assert (len(data.sequences), data.items) == (2500, 1000)
    assert all(len(set(s)) == len(s) == 9 for s in data.sequences)
    clusters = [len({i % 40 for i in s}) for s in data.sequences]
    assert sum(clusters) / 2500 < 5  # a user has few clusters
    counts = data.transitions()
    last = torch.tensor([s[-2] for s in data.sequences])
    unseen = counts.counts(last, torch.tensor([s[-1] for s in data.sequences])) == 0
    assert 0.7 < unseen.double().mean() < 0.9  # the spec found 0.79
    few = [mqsa_ted.made(seed, 50).digest() for seed in (1, 1, 2)]
    assert few[0] == few[1] != few[2]


def test_the_arms_of_the_next_item():
    settings = {cell: mqsa_ted.setting_of(cell, 2e-3) for cell in mqsa_ted.CELLS}
    assert [name for name, _ in settings.values()] == ["made"] * 5 + ["films"] * 2
    shares = [(s.recipe.alpha, s.recipe.distil) for _, s in settings.values()]
    assert shares[:5] == [(1.0, 0.0), (0.5, 0.0), (0.5, 0.0), (1.0, 0.1), (0.5, 0.1)]
    assert {(s.lr, s.batch, s.l2) for _, s in settings.values()} == {(2e-3, 256, 3e-5)}
    windows = {cell: s.recipe.window for cell, (_, s) in settings.items()}
    assert windows.pop("made SASRec twice") == 1
    assert set(windows.values()) == {3}
