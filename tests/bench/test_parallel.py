"""`foveate bench parallel`: all figures are there, bytes are theory's, errors get no speed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from foveate.bench import parallel as job
from foveate.bench import parallel_ranks
from foveate.bench.parallel_command import page, tables
from foveate.bench.parallel_ranks import Task
from foveate.cli import main
from foveate.ops import causal
from foveate.ops.errors import InputError
from foveate.parallel.context import ContextParallel, run_local
from foveate.parallel.spawn import Place


def test_a_small_run_through_the_command(tmp_path, capsys):
    args = [
        "bench", "parallel", "--quick", "--lengths", "512", "--masks", "causal-document",
        "--schemes", "ring; usp(ulysses=2); magi; ulysses(ulysses=3)", "--repeats", "1",
        "--heads", "4", "--head-dim", "16", "--out", str(tmp_path), "--json",
    ]  # fmt: skip
    assert main(args) == 0
    found = json.loads(capsys.readouterr().out)
    results = found["cells"][0]["values"]["results"]
    assert len(results) == 4 * 2
    for result in results:
        if result["scheme"] == "ulysses(ulysses=3)":
            assert "doesn't divide" in result["refused"]
            continue
        assert result["right"]
        assert result["error"] < 2e-5
        assert job.exact(result)
        assert result["speed_up"] > 0
        assert result["first_seconds"] > 0
        assert len(result["wall"]) == len(result["cpu"]) == 1
    ring = {r["sharding"]: r for r in results if r["scheme"] == "ring"}
    assert ring["document-zigzag"]["imbalance"] < ring["contiguous"]["imbalance"]
    text = (tmp_path / "parallel.md").read_text()
    assert "| ring | contiguous |" in text
    assert "to the number" in text
    assert main(args) == 0  # nothing is measured twice
    assert json.loads(capsys.readouterr().out)["cells"] == found["cells"]


def test_what_is_wrong_gets_no_speed(tmp_path):
    one = {
        "scheme": "ring", "sharding": "zigzag", "right": False, "error": 0.5, "imbalance": 1.0,
        "area_imbalance": 1.0, "first_seconds": 1.0, "peak_bytes": 5, "bytes": 8, "cpu": [1.0],
        "wall": [1.0], "sent": {"forward": 1, "backward": 1},
        "theory": {"forward": 1.0, "backward": 2.0},
    }  # fmt: skip
    result = job._together([one, one | {"right": True}], 1.0)
    assert "speed_up" not in result
    cell = {"cell": {"mask": "causal", "length": 8, "ranks": 2}, "values": {"results": [result]}}
    said = job.lines([cell])
    assert any("WRONG: ring zigzag on causal" in line for line in said)
    assert any("differs from the formulas" in line for line in said)
    assert "WRONG by" in page([cell], said, tmp_path / "p.md").read_text()
    assert tables([cell])[0].row_count == 1


@pytest.mark.parametrize("wrong", range(4))
def test_nan_is_not_right(wrong, monkeypatch):
    """Wherever it stands, in the output or in a gradient."""

    def work(links):
        sequence = ContextParallel(links, "ring").sequence(16, causal())
        own = [torch.randn(1, 2, 16, 8) for _ in range(4)]
        found = [x.clone() for x in own]
        found[wrong][0, 0, 3, 1] = torch.nan
        monkeypatch.setattr(parallel_ranks, "_step", lambda *_: (found, {}))
        task = Task("causal", 16, 2, 2, 8, "float32", (), "short", 1, 0)
        result = {}
        parallel_ranks._judged(Place("a", 0, ("a",), None), result, sequence, own, own, task)
        return result

    result = run_local(1, work)[0]
    assert not result["right"]
    assert math.isnan(result["error"])


def test_options_are_refused_before_anything_runs():
    for wrong in ({"schemes": ("rng",)}, {"shardings": ("zag",)}, {"masks": ("casual",)},
                  {"heads": 3}, {"ranks": (0,)}, {"dtype": "int8"}):  # fmt: skip
        with pytest.raises(InputError):
            job.Options(**wrong).check()
