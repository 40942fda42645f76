"""The miniatures of rcmha and lama: what they count, their arms, and what is compared."""

from __future__ import annotations

import pytest
import torch

from foveate import papers
from foveate.papers.harness import Trial
from foveate.papers.harness.statistics import Verdict

pytest.importorskip("transformers")

from foveate.papers import lama, rcmha  # noqa: E402


def cell(key, name, tmp_path, **more):
    made = papers.load(key)
    torch.manual_seed(0)
    trial = Trial(name, 1, quick=True, folder=tmp_path / "checkpoints", **more)
    return made, made.run(trial)


@pytest.mark.parametrize("arm", list(rcmha.ARMS))
def test_rcmha_trains_an_arm(arm, tmp_path):
    made, found = cell("rcmha", arm, tmp_path, tuned=4e-3)
    assert arm in made.grid.cells  # tuned as all others
    figures = found[arm]
    assert 0 <= figures["accuracy"] <= 1
    assert figures["early"] == figures["curve"][0][1]
    assert figures["bytes for backward"] > 0


def test_rcmhas_arms_differ_by_what_they_are_named_for():
    """By the spec's formula, 96 wide with 4 heads of 24 in 2 layers; its own runs had 64 rows."""

    def parameters(arm):
        attention, position = rcmha.ARMS[arm]
        model = rcmha.language_model(rcmha.SIZES, attention=attention, position=position)
        return sum(p.numel() for p in model.parameters())

    filters, relative = 2 * 3 * 4 * 24, 2 * (2 * 64 * 4 * 25 + 96)
    assert parameters("MDHA") - parameters("MHA") == filters == 168_641 - 168_065
    assert parameters("RMHA") - parameters("MHA") == relative - 64 * 96
    assert relative - 2 * 64 * 4 * 25 - 64 * 96 == 174_913 - 168_065
    assert parameters("RCMHA") - parameters("RMHA") == filters


def test_rcmha_counts_what_backward_keeps():
    """A linear map keeps its input; what is kept twice is counted once."""
    from foveate.papers.tasks.base import Batch

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(8, 4)
            self.out = torch.nn.Linear(4, 8)

        def forward(self, ids):
            return self.out(self.table(ids))

    ids = torch.randint(8, (2, 3))
    kept = rcmha.kept_for_backward(Linear(), Batch(ids, ids))
    # ids once (int64, shared with the targets), the rows of the table, the log-softmax and the
    # weight's sum of the loss, a number.
    assert kept == 6 * 8 + 6 * 4 * 4 + 6 * 8 * 4 + 4


@pytest.mark.parametrize("arm", list(rcmha.RECALLS))
def test_rcmha_trains_to_recall(arm, tmp_path):
    _, found = cell("rcmha", arm, tmp_path)
    assert 0 <= found[rcmha.RECALLS[arm]]["recall"] <= 1


def test_rcmhas_claim_is_judged_on_the_differences():
    made = papers.load("rcmha")
    seeds = [
        {
            arm: {"accuracy": a, "early": 2.5 - a, "recall": r, "loss": 2.0}
            for arm, a, r in (
                ("MHA", 0.33, 0), ("MDHA", 0.43, 0), ("RMHA", 0.42, 0.1), ("RCMHA", 0.43, 0.9)
            )
        }
    ] * 3  # fmt: skip
    assert {check.verdict(seeds) for check in made.checks} == {Verdict.HOLDS}
    worse = [at | {"RCMHA": at["RCMHA"] | {"accuracy": 0.41}} for at in seeds]
    assert made.checks[0].verdict(worse) == Verdict.REFUTED


@pytest.mark.parametrize("arm", ["mean", "last states", "transformer", "LAMA+ctx", "LAMA, penalty"])
def test_lama_trains_an_arm(arm, tmp_path):
    _, found = cell("lama", arm, tmp_path, tuned=1e-3)
    figures = found[arm]
    assert 0 <= figures["accuracy"] <= 1
    assert ("lift" in figures) is arm.startswith("LAMA")


def test_lamas_attention_is_counted():
    texts = lama.task()
    counts = {
        arm: lama.attention_parameters(lama.classifier(texts, arm))
        for arm in ("mean", "self-attentive", "transformer", "LAMA", "LAMA+ctx")
    }
    assert counts == {
        "mean": 0, "self-attentive": 128 * 64 + 64 * 8, "transformer": 4 * 128**2,
        "LAMA": 2 * 128 * 8 + 128, "LAMA+ctx": 2 * 128 * 8,
    }  # fmt: skip
    at = {arm: {"attention parameters": float(n)} for arm, n in counts.items()}
    exact = [c for c in papers.load("lama").checks if c.exact]
    assert {check.verdict([at]) for check in exact} == {Verdict.HOLDS}


def test_lamas_lift_counts_words_of_the_labels_name():
    """A pooler that looks at the label's words alone finds each; one that looks at none, none."""
    from types import SimpleNamespace

    texts = lama.task()
    example = next(e for e in texts.data.test if "exchange rate" in e.texts[0]
                   and texts.data.labels[e.label] == "exchange_rate")  # fmt: skip
    said = lama.words(example.texts[0])
    named = torch.tensor([word in ("exchange", "rate") for word in said])

    class Looks(torch.nn.Module):
        def __init__(self, best):
            super().__init__()
            self.scores = torch.nn.Parameter(torch.cat((torch.zeros(1), best.float())))

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(pooler_weights=self.scores[None, None])

    only = SimpleNamespace(labels=texts.data.labels, test=(example,), train=texts.data.train)
    some = SimpleNamespace(data=only, ids=texts.ids, length=texts.length)
    share = named.float().mean().item()
    for best, hits in ((named, min(3, int(named.sum()))), (~named, 0)):
        found = lama.lift(lama.Classifier(Looks(best)), some)
        assert found == pytest.approx(hits / 3 / share)


def test_lamas_arms_are_chosen_by_validation():
    at = {
        arm: {"validation": v, "accuracy": a}
        for arm, v, a in (("LAMA", 1.0, 0.8), ("LAMA+ctx", 0.9, 0.7), ("mean", 0.95, 0.6))
    }
    assert lama.best(at, ("LAMA", "LAMA+ctx")) == "LAMA+ctx"
