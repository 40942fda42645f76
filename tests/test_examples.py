"""The examples run as they stand, and show what they say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]()


def test_masks(capsys):
    run("masks")
    assert "keeps 24% of causal's pairs" in capsys.readouterr().out


def test_adopt(capsys):
    pytest.importorskip("transformers")
    run("adopt")
    kl = dict(re.findall(r"^([\w-]+).*: KL (\S+)", capsys.readouterr().out, re.MULTILINE))
    assert abs(float(kl["full"])) < 1e-6
    assert float(kl["sink-window"]) > 1e-6


def test_compose():
    pytest.importorskip("transformers")
    assert run("compose") > 0.95


def test_plan(capsys):
    pytest.importorskip("typer")
    run("plan")
    out = capsys.readouterr().out
    assert "8192 tokens on H800: 0.063 USD" in out  # the Step-3 report's example
    assert "stride 16x8x8: 11.1 times fewer operations, 11.1 times fewer tiles" in out


def test_every_example_is_run_here_and_told_of():
    text = Path(__file__).read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES:
        assert f'run("{path.stem}")' in text
        assert f"examples/{path.name}" in readme
