"""Cells that are added to a kept verdict: old figures stay, old conditions too."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from foveate.ops.errors import InputError
from foveate.papers.harness import Paper, at_most, difference
from foveate.papers.harness.verdict import figures_of, verdict_object

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "extend_claim.py"


def script():
    spec = importlib.util.spec_from_file_location("extend_claim", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(trial):
    if trial.cell == "trained":
        raise AssertionError("nothing is trained again")
    return {"new": {"count": 5.0}} if trial.cell == "count" else {"ours": {"loss": 0.0}}


OLD = Paper(
    "toy", "c", "m", ("trained",), run, ("base",), ("ours",), (difference("ours", "base", 0.1),)
)
NEW = replace(
    OLD, cells=("trained", "count", "again"), ours=("ours", "new"),
    checks=(*OLD.checks, at_most("count", lambda at: at["new"]["count"], 6, exact=True)),
)  # fmt: skip
SEEDS = {s: {"base": {"loss": 1.0 + s}, "ours": {"loss": 0.9 + s}} for s in (0, 1, 2)}


def test_old_figures_stay_and_new_ones_are_judged():
    verdict = verdict_object(OLD, SEEDS, 60.0, {"threads": 1})
    new = script().extended(NEW, verdict, ["count"])
    assert new["holds_if"] == NEW.holds_if
    assert new["verdict"] == verdict["verdict"] == "holds"
    assert new["seconds"] >= 60
    for seed, found in zip((0, 1, 2), figures_of(new)):
        assert found == SEEDS[seed] | {"new": {"count": 5.0}}
    stricter = replace(
        NEW, checks=(*OLD.checks, at_most("count", lambda at: at["new"]["count"], 4, exact=True))
    )
    assert script().extended(stricter, verdict, ["count"])["verdict"] == "refuted"


def test_refusals():
    verdict = verdict_object(OLD, SEEDS, 60.0, {"threads": 1})
    changed = replace(NEW, checks=(difference("ours", "base", 0.2), NEW.checks[1]))
    for paper, given, cells, says in (
        (changed, verdict, ["count"], "changed since"), (NEW, verdict, ["nope"], "no cell"),
        (NEW, verdict, ["again"], "which are there"), (NEW, verdict, [], "missing are new"),
        (NEW, verdict | {"key": "other"}, ["count"], "no verdict of toy"),
        (NEW, verdict | {"environment": {"quick": True}}, ["count"], "quick"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            script().extended(paper, json.loads(json.dumps(given)), cells)
