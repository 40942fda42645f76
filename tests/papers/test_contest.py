"""`foveate recall`: windows cost what methods cost, every arm is trained alike."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from foveate import catalog
from foveate.cli import main
from foveate.ops.errors import InputError
from foveate.papers.contest import job
from foveate.papers.harness import Trial

ROUTING = "routing-transformer(clusters=8, window=16, block=16)"


def test_windows_are_the_narrowest_of_equal_cost():
    for keys in (1, 16, 100):
        operations = job.cost(job.window_text(keys), 32, 2)
        pairs = sum(min(keys, i + 1) for i in range(job.LENGTH))
        assert operations == 2 * pairs * 2 * 32
        assert job.window_of(operations, 32) == keys
        assert job.window_of(operations + 1, 32) == keys + 1
    assert job.window_of(job.cost("full", 32, 2), 32) == job.LENGTH
    assert job.window_of(1e12, 32) == job.LENGTH


def test_the_cost_of_choosing_counts():
    pairs = 4 * 2 * (16 * 15 // 2 + 1)  # two routing heads' clusters, in training
    scores = 2 * 2 * 8 * job.LENGTH * 16  # two heads, 8 centroids, width 16
    local = sum(min(i % 16 + 17, i + 1) for i in range(job.LENGTH)) * 2
    fields = "clusters=4, window=16, block=16, local=2"
    found = job.cost(f"routing-transformer({fields})", 64, 4)
    assert found == 2 * (pairs + local) * 2 * 16 + scores / 2


def test_arms_and_checks():
    contest = job.Contest(methods=(ROUTING, "full"), tasks=("needle",), rates=(1e-3,))
    paper = job.paper_of(contest)
    keys = contest.equal(ROUTING)
    assert 16 < keys < job.LENGTH
    assert list(contest.arms) == ["dense", "window 16", f"window {keys}", ROUTING, "full"]
    assert contest.rival("full") == "dense"
    assert paper.grid is None
    names = [check.name for check in paper.checks]
    assert f"needle: {ROUTING} - window {keys}" in names
    assert [check.name for check in paper.needs] == ["needle: dense"]
    assert set(paper.baseline) | set(paper.ours) == set(paper.cells)


@pytest.mark.parametrize("key", [key for key in job.SMALL if key in catalog.keys()])  # noqa: SIM118
def test_every_method_trains_a_step(key, tmp_path):
    contest = job.Contest(methods=(key,), tasks=("recall",), steps=1, layers=1, dim=32, batch=2)
    assert job.cost(contest.text(key), 32, 2) > 0
    trial = Trial(f"recall: {key}", 0, quick=True, tuned=1e-3, folder=tmp_path)
    found = job.Runner(contest)(trial)[f"recall: {key}"]
    assert 0 <= found["accuracy"] <= 1
    assert found["MFLOP"] > 0


def test_another_budget_is_another_figure():
    one, two = (job.Contest(methods=("full",), steps=n) for n in (100, 200))
    assert job.paper_of(one).data() != job.paper_of(two).data()


def test_a_cell_is_trained_by_its_rate_and_seed(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        job, "train", lambda model, task, regime, **_: seen.append((task, regime)) or job_done()
    )
    monkeypatch.setattr(job, "evaluate", lambda *_: {"accuracy": 0.5})
    contest = job.Contest(methods=("full",), steps=500)
    found = job.Runner(contest)(Trial("needle: window 16", 3, tuned=2e-3, folder=tmp_path))
    assert found["needle: window 16"]["accuracy"] == 0.5
    ((task, regime),) = seen
    assert task is job.TASKS["needle"]
    assert (regime.steps, regime.lr, regime.seed, regime.batch) == (500, 2e-3, 3, 32)
    job.Runner(contest)(Trial("recall: full", 1000, tuned=1e-3, tuning=True, share=0.4))
    assert seen[1][1].steps == 200
    assert job.paper_of(contest).grid.share == 1


def job_done():
    from foveate.papers.training.loop import Trained

    return Trained(history=[{"step": 1, "validation": 1.0}])


@pytest.mark.parametrize(
    "given", [{"tasks": ("copy",)}, {"steps": 2501}, {"methods": ()}, {"small": 128}]
)
def test_what_is_refused(given):
    with pytest.raises(InputError):
        job.Contest(**given)


def test_command_runs_and_goes_on(tmp_path, capsys):
    given = [
        "recall", "--methods", "full", "--tasks", "needle", "--quick", "--rates", "0.001",
        "--json", "--out", str(tmp_path),
    ]  # fmt: skip
    assert main(given) == 0
    first = json.loads(capsys.readouterr().out)
    assert set(first["ours"]) == {"needle: full"}
    assert first["verdict"] == "inconclusive"
    torch.manual_seed(5)
    assert main(given) == 0
    assert json.loads(capsys.readouterr().out)["ours"] == first["ours"]
    assert main(["recall", "--rates", "x", "--out", str(tmp_path)]) == 2
