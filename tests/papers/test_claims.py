"""`foveate claims`: one row for each paper, whether it was run, can be run, or neither."""

import json
import runpy
from pathlib import Path

import pytest
from toys import paper

import foveate
from foveate import papers
from foveate.cli import claims, main
from foveate.ops.errors import InputError
from foveate.papers.harness import at_least
from foveate.papers.harness.overview import NO_MINIATURE, NOT_RUN, met, rows, summary, took
from foveate.papers.harness.run import Run
from foveate.papers.harness.table import duration, kept_verdicts, place, section

ROOT = Path(foveate.__file__).resolve().parents[2]


@pytest.fixture
def kept(tmp_path):
    """A folder with the verdict of `toy`."""
    with Run(paper(), tmp_path / "out") as ready:
        verdict = ready().verdict
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "toy.json").write_text(json.dumps(verdict))
    return tmp_path / "kept"


@pytest.fixture
def made(monkeypatch):
    """Two miniatures, and a paper of the catalog that has none."""
    toys = {"toy": paper(), "other": paper(key="other")}
    monkeypatch.setattr(papers, "available", lambda: tuple(sorted(toys)))
    monkeypatch.setattr(papers, "load", toys.__getitem__)
    monkeypatch.setattr(claims, "papers_of_the_list", lambda: ("toy", "bare"))
    return toys


def test_every_paper_has_a_row_with_claim_figures_and_place(made, kept, capsys):
    assert main(["claims", "--results", str(kept), "--json"]) == 0
    found = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert {key: row["verdict"] for key, row in found.items()} == {
        "toy": "holds", "other": NOT_RUN, "bare": NO_MINIATURE,
    }  # fmt: skip
    toy = found["toy"]
    assert toy["claim"] == found["other"]["claim"] == "A toy loses next to nothing."
    assert toy["ours"] == "loss(ours) - loss(dense): 0.01"
    assert [(c["text"], c["verdict"], c["exact"]) for c in toy["checks"]] == [
        ("loss(ours) - loss(dense) <= 0.03", "holds", False),
        ("cache(dense) / cache(ours) >= 8", "holds", True),
    ]
    assert (met(toy), toy["seeds"]) == ("2 of 2", [0, 1, 2])
    assert toy["seconds"] >= 0
    assert took(toy).endswith(f"torch {toy['environment']['torch']}")
    assert (met(found["bare"]), took(found["bare"])) == ("", "")


def test_people_see_a_table_and_the_counts(made, kept, capsys):
    assert main(["claims", "--results", str(kept)]) == 0
    out = capsys.readouterr().out
    assert out.index("bare") < out.index("other") < out.index("toy")
    assert "Of 3 papers: 1 hold, 0 refuted, 0 inconclusive, 1 not run yet, 1 without" in out


def test_times_and_places_are_told_in_words():
    where = {"processor": "EPYC", "threads": 1, "torch": "2.13", "device": "cpu"}
    assert place(where) == "EPYC, 1 thread, torch 2.13"
    there = where | {"threads": 2, "device": "NVIDIA H200"}
    assert place(there) == "NVIDIA H200, EPYC, 2 threads, torch 2.13"
    assert [duration(s) for s in (0.2, 1, 28, 95, 3780)] == [
        "0 seconds", "1 second", "28 seconds", "2 minutes", "63 minutes",
    ]  # fmt: skip


def test_a_miniature_that_changed_since_is_told(made, kept, capsys):
    changed = at_least("cache", lambda at: at["dense"]["cache"], 8)
    made["toy"] = paper(checks=(changed,))
    assert main(["claims", "--results", str(kept)]) == 2
    assert "run it again" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_refused(capsys, tmp_path):
    assert main(["claims", "--results", str(tmp_path / "none")]) == 2
    assert "expected a folder of verdicts" in capsys.readouterr().err


def test_without_a_checkout_it_says_where_verdicts_come_from(monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "KEPT", tmp_path / "none")
    with pytest.raises(InputError, match="--results"):
        claims._kept(None)


def test_the_catalogs_papers_and_all_miniatures_are_in_the_table():
    found = rows(claims.papers_of_the_list(), papers.available(), papers.load, {})
    assert {row["key"] for row in found} >= set(papers.available())
    assert {row["key"] for row in found} >= {
        r.miniature for r in foveate.catalog.rows() if r.miniature
    }
    assert summary(found).startswith(f"Of {len(found)} papers: 0 hold, 0 refuted")


def test_what_is_refuted_is_explained():
    """A page that says "refuted" says what we make of it, behind the conditions."""
    for key, verdict in kept_verdicts(ROOT / "benchmarks" / "results" / "claims").items():
        made = papers.load(key)
        if verdict["verdict"] == "refuted":
            assert made.remark, f"{key}: say in the miniature's remark why"
        if made.remark:
            assert made.remark in section(made, verdict)
            assert made.remark not in section(made, None)


def test_readme_shows_todays_counts():
    script = runpy.run_path(str(ROOT / "scripts" / "update_claims.py"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script["readme"](text) == text, "run python scripts/update_claims.py"
    with pytest.raises(SystemExit, match="lacks the markers"):
        script["readme"]("no markers here")
