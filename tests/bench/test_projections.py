"""`foveate bench projections`: what is held and read, checked before it is timed."""

from __future__ import annotations

import json

import pytest
import torch

from foveate.bench import projections
from foveate.cli import main
from foveate.nn import Attention
from foveate.ops.errors import InputError


def options(pace, **given):
    small = {"contexts": (96,), "dim": 64, "heads": 4, "footprint": 1, "pace": pace}
    return projections.Options(**(small | given))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_projection_is_right_and_timed(pace, dtype):
    (one,) = projections.run(options(pace, dtypes=(dtype,)))
    size = {"float32": 4, "bfloat16": 2}[dtype]
    results = {r["projection"]: r for r in one["values"]["results"]}
    assert list(results) == list(projections.every())
    for key, result in results.items():
        assert result["correct"], result
        per_token = Attention(64, 4, key).new_cache().elements_per_token
        assert result["elements"] == per_token
        assert result["bytes"] == 96 * per_token * size
        assert result["of_read"]["median"] > 0
    assert results["mha"]["vs_base"]["median"] == 1
    assert results["mqa"]["bytes"] * 4 == results["mha"]["bytes"]


def test_a_wrong_step_gets_no_speed(pace, monkeypatch):
    monkeypatch.setitem(projections.TOLERANCE, "float32", -1.0)
    (one,) = projections.run(options(pace, projections=("mha",)))
    (result,) = one["values"]["results"]
    assert result["failed"].startswith("wrong")
    assert "seconds" not in result


def test_caches_are_gone_through_in_turn(pace):
    cell = projections.Cell(96, 64, 4, "float32", 1)
    step = projections.Step("mla", cell, 5 * 96 * 64 * 4, 0)
    assert len(step.caches) == -(-5 * 64 // step.elements)
    for _ in range(2 * len(step.caches)):
        step.step()
    assert {len(cache) for cache in step.caches} == {96}


def test_reading_unrotated_keys_is_timed_with_their_rotation(pace, monkeypatch):
    """MFA-KR turns all keys at every step: a part of reading them, on memory of its own."""
    cell = projections.Cell(96, 64, 4, "float32", 1)
    step, seen = projections.Step("mfa-kr", cell, 1, 0), []

    def spy(query, entries):
        seen.append(entries)
        return absorb(query, entries)

    absorb = step.layer.projection.absorb
    monkeypatch.setattr(step.layer.projection, "absorb", spy)
    step.attend()
    kept = step.caches[0].entries["k"]
    rope = step.layer.rope
    torch.testing.assert_close(seen[0]["turned"], rope.rotate(kept, torch.arange(96)))
    assert seen[0]["k"].data_ptr() == kept.data_ptr()


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    args = (
        "bench", "projections", "mha,mfa(head_dim=16, query_rank=16),mla", "--quick",
        "--contexts", "64", "--dim", "64", "--heads", "4", "--footprint", "1", "--repeats", "3",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert main(list(args)) == 0
    out = capsys.readouterr().out
    assert "numbers/token" in out
    assert "mfa(head_dim=16, query_rank=16)" in out
    assert main([*args, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["cells"][0]["values"]["results"]) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"projections": ()}, "at least one"),
        ({"projections": ("mfaa",)}, "did you mean"),
        ({"projections": ("full",)}, "no projection"),
        ({"contexts": (0,)}, "at least 1"),
        ({"dtypes": ("int8",)}, "not known"),
    ],
)
def test_refusals(pace, given, said):
    with pytest.raises(InputError, match=said):
        projections.run(options(pace, **given))
