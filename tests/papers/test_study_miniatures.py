"""The miniatures of the studies: what they draw, count and look at."""

from __future__ import annotations

import math

import pytest
import torch

from foveate import papers
from foveate.papers.harness import Trial
from foveate.papers.harness.statistics import Verdict
from foveate.papers.tasks import IGNORED, Laundry, Repeated


def cell(key: str, name: str, tmp_path, quick=True):
    made = papers.load(key)
    torch.manual_seed(0)
    return made, made.run(Trial(name, 0, quick=quick, folder=tmp_path))


def test_strings_are_repeated_once_and_scored_on_their_second_copy():
    task = Repeated(least=3, most=6, symbols=9, held=8)
    lengths = set()
    batch = task.batch(0, 0, 60)
    assert batch.inputs.shape == (60, 11)
    for ids, targets in zip(batch.inputs.tolist(), batch.targets.tolist()):
        scored = [i for i, t in enumerate(targets) if t != IGNORED]
        length = scored[0]
        lengths.add(length)
        assert scored == list(range(length, 2 * length - 1))
        assert ids[length : 2 * length - 1] == ids[: length - 1]
        assert targets[length : 2 * length - 1] == ids[1:length]
    assert lengths == {3, 4, 5, 6}


def test_lists_lack_one_the_second_time():
    task = Laundry(3, 5, symbols=9, held=8)
    sizes, places = set(), set()
    batch = task.batch(0, 0, 80)
    assert batch.inputs.shape == (80, 11)
    for ids, targets in zip(batch.inputs.tolist(), batch.targets.tolist()):
        (at,) = (i for i, t in enumerate(targets) if t != IGNORED)
        items = at // 2
        sizes.add(items)
        listed, told = ids[:items], ids[items + 1 : at]
        assert ids[items] == 0
        assert ids[at] == 1
        assert set(ids[at + 1 :]) <= {0}
        assert len(set(listed)) == items
        assert min(listed) >= 2
        assert set(listed) - set(told) == {targets[at]}
        places.add(listed.index(targets[at]))
    assert sizes == {3, 4, 5}
    assert places == {0, 1, 2, 3, 4}
    assert task.of(4).batch(0, 0, 4).inputs.shape == (4, 9)


def test_a_list_that_is_judged_was_never_trained_on():
    """Of 84 lists of 2 out of 7 symbols most are drawn, alone and among longer ones."""
    task = Laundry(2, 4, symbols=7, held=16)
    trained = {tuple(ids[:5]) for ids in task.batch(0, 0, 600).inputs.tolist() if ids[2] == 0}
    judged = {tuple(ids) for b in task.of(2).held_out("test", 16) for ids in b.inputs.tolist()}
    assert len(trained) >= 40
    assert judged
    assert not trained & judged


def test_rank_correlation_shares_ranks():
    from foveate.papers.talking_heads import spearman

    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, torch.tensor([1.0, 2.0, 2.0, 3.0])) == pytest.approx(3 / math.sqrt(10))
    assert spearman(x, torch.ones(4)) == 0


def test_previous_token_and_induction_heads_are_found_by_where_they_look():
    """A model whose attention is set by hand: head 0.2 looks back, head 1.1 at what followed."""
    from foveate.lens.attention_only import AttentionOnly
    from foveate.papers import talking_heads

    task = Repeated(least=4, most=4, symbols=9, held=8)
    model = AttentionOnly(9, 64, 4, 2, 8)
    batch = task.batch(0, 0, 16)

    class Told:
        def weights(self, layer):
            found = torch.zeros(16, 4, 7, 7)
            for t in range(7):
                found[:, 2 if layer == 0 else 1, t, max(0, t - (1 if layer == 0 else 3))] = 1
            return found

    def watched(model):
        import contextlib

        return contextlib.nullcontext(Told())

    before, talking_heads.watched = talking_heads.watched, watched
    try:
        back, copying = talking_heads.looks(model, batch)
    finally:
        talking_heads.watched = before
    assert back.tolist() == [0, 0, 1, 0]
    assert copying.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("name", ["induction", "laundry"])
def test_a_cell_of_talking_heads_runs(name, tmp_path):
    made, found = cell("talking-heads", name, tmp_path)
    if name == "induction":
        assert found["highest CS"].keys() == found["lowest CS"].keys()
        assert -1 <= found["single removals"]["Spearman CS"] <= 1
        assert 0 <= found["model"]["accuracy"] <= 1
    else:
        assert set(found) == {"laundry", "rescaled", "rescaled, lowest z"}
        assert 0 <= found["rescaled"]["components"] <= 3
    for figures in found.values():
        assert all(math.isfinite(value) for value in figures.values())
    assert set(found) < {*made.baseline, *made.ours}


def test_lists_are_learnt_until_enough_are_right(monkeypatch):
    from foveate.lens.attention_only import AttentionOnly
    from foveate.papers import talking_heads

    task = Laundry(3, 4, symbols=9, held=8)
    model, told = AttentionOnly(task.vocab, 16, length=task.length), []
    right = iter((0.1, 0.7))
    monkeypatch.setattr(talking_heads, "evaluate", lambda *_: {"accuracy": next(right)})
    before = model.embed.weight.detach().clone()
    talking_heads.learn(model, task, 600, 0, lambda share, doing: told.append(doing))
    assert told == ["step 0, 10% right", "step 250, 70% right"]
    assert not torch.equal(model.embed.weight, before)
    assert not model.training


def test_the_machines_are_counted(tmp_path):
    made, found = cell("ocr", "machines", tmp_path)
    exact = [check for check in made.checks if check.exact]
    assert len(exact) == 2
    assert all(check.verdict([found]) == Verdict.HOLDS for check in exact)


@pytest.mark.parametrize("name", ["5, 1, 4", "ranks", "ablations"])
def test_a_cell_of_ocr_runs(name, tmp_path):
    made, found = cell("ocr", name, tmp_path)
    assert set(found) < {*made.baseline, *made.ours}
    for figures in found.values():
        assert 0 <= figures["accuracy"] <= 1
        assert figures["least loss"] <= figures["test loss"]
    if name == "5, 1, 4":
        assert set(found) == {"factorised 5, 1, 4", "merged 5, 1, 4"}
        assert abs(found["merged 5, 1, 4"]["cosine nuclear"]) <= 1
