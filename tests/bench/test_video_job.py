"""bench video: cells, figures, the gate, the command."""

from __future__ import annotations

import json

import pytest
import torch

from foveate.bench import video as job
from foveate.cli import main
from foveate.ops import AttentionOutput
from foveate.ops.errors import InputError
from foveate.runs.timing import Pace

METHODS = (
    "vmoba(frames=1, tile=(4, 4), box=(2, 4, 4), select='topk', topk=16)",
    "vmoba(frames=1, tile=(4, 4), box=(2, 4, 4))",
    "rectified-spaattn(block=16, neighbours=False)",
)


def options(**more):
    given = {"methods": METHODS, "sizes": (4, 8, 8), "steps": (1, 1), "pace": Pace(repeats=1)}
    return job.Options(**(given | more))


def test_cells_say_how_much_is_computed_and_how_far_off_it_is():
    everything, some, rectified = (one["values"] for one in job.run(options()))
    assert everything["density"] == pytest.approx(1)
    assert everything["ideal"] == pytest.approx(1)
    assert everything["off"] < 1e-5
    assert everything["model_off"] < 1e-5
    for found in (some, rectified):
        assert 0.05 < found["density"] < 0.6
        assert found["off"] > 1e-3
        assert found["ideal"] == pytest.approx(
            3 / sum(1 / layer["ideal"] for layer in found["layers"])
        )
        assert found["times_faster"] > 0
    assert [layer["layer"] for layer in some["layers"]] == [0, 1, 2]


def test_a_wrong_output_gets_no_speed(monkeypatch):
    class Wrong(type(job.make("vmoba"))):
        def __call__(self, q, k, v, ctx=None):
            out, lse = super().__call__(q, k, v, ctx)
            return AttentionOutput(out * (1.1 if out.dtype == torch.float32 else 1), lse)

    monkeypatch.setattr(job, "make", lambda text: Wrong(frames=1, tile=(4, 4), box=(2, 4, 4)))
    (found,) = job.run(options(methods=METHODS[1:2]))
    values = found["values"]
    assert "times_faster" not in values
    assert all("off by" in layer["failed"] for layer in values["layers"])


def test_heads_that_choose_together_get_a_speed():
    method = "vmoba(frames=1, tile=(4, 4), box=(2, 4, 4), scope='query-heads')"
    (found,) = job.run(options(methods=(method,)))
    assert found["values"]["times_faster"] > 0


def test_bad_options_are_refused():
    for bad in ({"sizes": (0, 8, 8)}, {"sizes": (8, 8)}, {"methods": ("mfa",)}, {"steps": (-1, 0)}):
        with pytest.raises(InputError):
            options(**bad).check()
    assert main(["bench", "video", "--size", "8x8"]) == 2
    assert main(["bench", "video", "--steps", "8"]) == 2


def test_the_command(tmp_path, capsys):
    given = ["bench", "video", "--size", "4x8x8", "--steps", "1,1", "--repeats", "1"]
    given += ["--methods", METHODS[1], "--out", str(tmp_path)]
    assert main([*given, "--json"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert cell["values"]["tokens"] == 256
    assert main(given) == 0  # from the records, as a table
    assert "times faster" in capsys.readouterr().out
