"""The coverage-guided fuzzer itself: it builds, finds its way, and its inputs can be replayed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "fuzz_engine.py"
COMPILER = os.environ.get("CXX", "c++").split()[0]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree"),
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which(COMPILER) is None, reason="needs g++ on Linux"
    ),
]


def test_it_finds_its_way_and_replays_what_it_kept(tmp_path: Path) -> None:
    def run(*more: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, str(SCRIPT), "--plain", "--isa", "portable"]
        call += ["--folder", str(tmp_path), *more]
        return subprocess.run(call, capture_output=True, text=True)

    done = run("--minutes", "0.15")
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    kept = list((tmp_path / "corpus").iterdir())
    assert facts["kernels"] == ["portable"]
    assert facts["calls"] > 5
    assert facts["edges"] > 300
    assert len(kept) == facts["kept"] > 5
    assert facts["failures"] == 0
    again = run("--replay", str(kept[0]))
    assert again.returncode == 0, again.stderr[-3000:]
    assert "passed" in again.stdout
