"""The catalog: its rows are whole, true of the classes, and what the README shows."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import runpy
from pathlib import Path

import pytest

from foveate import catalog
from foveate.ops.errors import UnknownMethodError

ROOT = Path(__file__).resolve().parent.parent
KEYS = catalog.keys()
ROWS = pytest.mark.parametrize("row", catalog.rows(), ids=KEYS)


def test_the_first_methods_are_there():
    first = {"full", "sink-window", "a-shape", "vertical-slash", "block-sparse"}
    assert first <= set(KEYS)


def test_keys_are_unique_and_spelled_as_command_line_words():
    assert len(set(KEYS)) == len(KEYS)
    for key in KEYS:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key)


@ROWS
def test_row_leads_to_a_documented_class(row):
    method = row.load()
    assert inspect.isclass(method)
    assert row.path == f"{row.path.rpartition('.')[0]}.{method.__name__}"
    assert (method.__doc__ or "").strip()
    assert dataclasses.is_dataclass(method)
    method()  # every hyper-parameter has the paper's default


@ROWS
def test_row_is_whole(row):
    assert row.title
    assert row.summary.endswith(".")
    assert row.jobs
    for paper in row.papers:
        assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
        assert paper.url.endswith(paper.arxiv)
    assert row.papers or row.miniature == ""


@ROWS
def test_what_does_not_work_says_why(row):
    for field in dataclasses.fields(row.capabilities):
        support = getattr(row.capabilities, field.name)
        assert support.works or support.note, f"{row.key}: {field.name} is refused without a reason"


@ROWS
def test_row_survives_json(row):
    plain = json.loads(json.dumps(row.as_dict()))
    assert plain["key"] == row.key
    assert plain["capabilities"]["prefill"]["works"] is row.capabilities.prefill.works
    assert [p["arxiv"] for p in plain["papers"]] == [p.arxiv for p in row.papers]


@pytest.mark.parametrize(
    ("typed", "meant"), [("sink_window", "sink-window"), ("vertcal-slash", "vertical-slash")]
)
def test_unknown_key_offers_the_nearest(typed, meant):
    with pytest.raises(UnknownMethodError, match=f"{typed}.*{meant}"):
        catalog.get(typed)


def test_get_finds_every_key():
    assert [catalog.get(key).key for key in KEYS] == list(KEYS)


def test_markdown_table_has_a_line_per_method():
    lines = catalog.markdown_table().splitlines()
    assert len(lines) == 2 + len(catalog.rows())
    assert len({line.count(" | ") for line in lines if "---" not in line}) == 1


def test_readme_shows_todays_table():
    script = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script["updated"](text) == text, "run python scripts/update_readme.py"


def test_readme_update_needs_its_markers():
    script = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    with pytest.raises(SystemExit, match="lacks the markers"):
        script["updated"]("no markers here")
