"""ColBERTer's miniature: its path with a tiny encoder, and what its arms are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

for package in ("transformers", "safetensors", "bm25s", "snowballstemmer"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "retrieve"))

import retrieve_models as tiny  # noqa: E402

from foveate.papers import colberter  # noqa: E402
from foveate.papers.harness import Trial  # noqa: E402


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A tiny encoder in MiniLM's place, and texts cut to what it takes."""
    folder = tiny.encoder(tmp_path_factory.mktemp("colberter") / "encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(colberter, "ENCODER", str(folder))
        patch.setattr(colberter, "LENGTH", 40)
        yield


def test_the_path_is_whole(small, tmp_path):
    trial = Trial("retrieval", 0, quick=True, folder=tmp_path / "states")
    found = colberter.run(trial)
    paper = colberter.PAPER
    assert set(found) == {*paper.baseline, *paper.ours}
    two, words = found[colberter.TWO], found[colberter.WORDS]
    assert words["vectors"] < two["vectors"]
    assert words["bytes"] == pytest.approx(256 + 64 * words["vectors"])
    uni = found[colberter.UNI]
    assert uni["bytes"] == pytest.approx(256 + 6 * uni["vectors"])
    frequent = found[colberter.FREQUENT]["vectors"]
    assert frequent <= found["stopwords"]["vectors"]
    for check in (*paper.checks, *paper.needs):
        assert torch.isfinite(torch.tensor(check.figure(found)))
    assert found[colberter.FIXED]["gamma"] == 0.0
    again = colberter.run(trial)  # from the kept states of each arm: the same figures
    assert again == found


def test_no_answer_of_a_test_claim_is_trained_on():
    _, test, train = colberter._collection(quick=False)
    answers = {key for gains in test.gains for key in gains}
    assert len(test) == 300
    assert 400 < len(train) < 809
    assert all(not answers & gains.keys() for gains in train.gains)
    assert not set(test.texts) & set(train.texts)


def test_pca_has_no_gates_that_nobody_trained(small, monkeypatch):
    seen = []
    before = colberter._measured
    monkeypatch.setattr(colberter, "_KEPT", {})
    monkeypatch.setattr(
        colberter, "_measured", lambda head, *more: seen.append(head) or before(head, *more)
    )
    data = colberter._data(Trial("retrieval", 0, quick=True))
    assert [head.stopwords for head in seen] == [None]
    words = sum(len(t.words.ids) for t in data.lessons.passages.tokens)
    assert data.untrained[colberter.PCA]["vectors"] == words / len(data.lessons.passages)


def test_arms_that_are_compared_are_trained_alike(small, tmp_path, monkeypatch):
    steps: dict[int, tuple[int, ...]] = {}
    train, follow = colberter.fit.train, colberter.fit.follow

    def counted(head, lessons, plan, *more, **named):
        steps[id(head)] = (*steps.get(id(head), ()), plan.steps)
        heads.append(head)
        return train(head, lessons, plan, *more, **named)

    def followed(head, before, lessons):
        steps[id(head)] = steps[id(before)]
        follow(head, before, lessons)

    heads: list[torch.nn.Module] = []  # kept alive, so that no id is given twice
    monkeypatch.setattr(colberter.fit, "train", counted)
    monkeypatch.setattr(colberter.fit, "follow", followed)
    measured = {}
    before = colberter._measured

    def figures(head, data, encode):
        found = before(head, data, encode)
        measured[id(head)] = steps.get(id(head))
        return found

    monkeypatch.setattr(colberter, "_measured", figures)
    colberter.run(Trial("retrieval", 0, quick=True))
    made = [many for many in measured.values() if many is not None]
    assert made == [(3, 2)] * 6 + [(3, 2, 2)]


def test_frequent_words_go_first(small):
    data = colberter._data(Trial("retrieval", 0, quick=True))
    bank = data.lessons.passages
    head = colberter.FULL.build(24).eval()
    for most in (5.0, 1e9):
        encode = colberter._without_frequent(head, bank, most)
        kept: dict[int, int] = {}
        gone: dict[int, int] = {}
        for _, some in bank.batches():
            found = encode(some, True)
            for ids, real in zip(found.ids.tolist(), found.real.tolist()):
                for i, there in zip(ids, real):
                    if i:
                        place = kept if there else gone
                        place[i] = place.get(i, 0) + 1
        assert sum(kept.values()) / len(bank) <= most
        if most == 5.0:
            assert not set(kept) & set(gone)
            assert min(gone.values()) >= max(kept.values())
        else:
            assert not gone
