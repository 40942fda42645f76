"""`foveate bench neighborhood`: every form is checked before it is timed, and held to the bound."""

from __future__ import annotations

import json

import pytest
import torch

from foveate.bench import neighborhood as job
from foveate.cli import main
from foveate.ops.errors import InputError

SETTINGS = (
    job.Setting((160,), (31,), (1,)),
    job.Setting((12, 20), (5, 4), (1, 2)),
    job.Setting((32, 32), (16, 16), (16, 16), (8, 8), (8, 8), ("fused",)),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_is_right_and_timed(pace, dtype):
    found = job.run(job.Options(SETTINGS, head_dims=(16,), dtypes=(dtype,), pace=pace))
    for setting, one in zip(SETTINGS, found, strict=True):
        results = {r["form"]: r for r in one["values"]["results"]}
        assert list(results) == [*setting.forms, "in tiles"]
        for name, result in results.items():
            assert "failed" not in result, result
            assert result["seconds"]["median"] > 0
            assert ("of_bound" in result) == (name in ("fused", "in tiles"))
        if "naive" in results:
            assert results["naive"]["vs_naive"]["median"] == 1
    assert found[2]["values"]["bound"] == found[2]["values"]["flops"] == 4


def test_a_wrong_form_gets_no_speed(pace, monkeypatch):
    right = job.unfused
    monkeypatch.setattr(job, "unfused", lambda *x: right(*x)._replace(out=right(*x).out + 1e-3))
    (one,) = job.run(job.Options(SETTINGS[:1], head_dims=(16,), pace=pace))
    results = {r["form"]: r for r in one["values"]["results"]}
    assert results["unfused"]["failed"].startswith("wrong")
    assert "seconds" not in results["unfused"]
    assert "seconds" in results["fused"]


def test_rows_that_are_checked_come_from_the_definition():
    mask = job.neighborhood((6, 7), (3, 4), (1, 2))
    q, k, v = torch.randn(3, 1, 2, 42, 8).unbind(0)
    rows = torch.tensor([41, 0, 17])
    scores = (q[:, :, rows].double() @ k.double().mT) * 8**-0.5
    seen = mask.dense(42, 42)[0, 0][rows]
    want = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.double()
    torch.testing.assert_close(job.expected(q, k, v, mask, rows), want)


def test_settings_are_read_from_text():
    assert job.parse("4096:255,64x64:13x13:1x2") == (
        job.Setting((4096,), (255,), (1,)), job.Setting((64, 64), (13, 13), (1, 2)),
    )  # fmt: skip
    for text in ("64x64", "64y64:3", "64x64:"):
        with pytest.raises(InputError, match="expected such as"):
            job.parse(text)
    with pytest.raises(InputError, match="axis 0 has 8"):
        job.parse("8x8:9x9")


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    args = ["bench", "neighborhood", "--settings", "160:31,12x12:5x5:1x5", "--quick",
            "--head-dims", "16", "--repeats", "3", "--out", str(tmp_path)]  # fmt: skip
    assert main(args) == 0
    shown = capsys.readouterr().out
    assert "in tiles" in shown
    assert "12x12" in shown
    assert main([*args, "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert len(cells) == 2
    assert (tmp_path / "results.jsonl").exists()
