"""The bench of attentions that are trained: what it counts and fits, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from foveate.bench import trained
from foveate.ops.errors import FoveateError, InputError
from foveate.parts import Heads
from foveate.parts.growth import exponent
from foveate.runs.timing import Pace

HEADS = Heads(32, 4, 2, 8, 8)


@pytest.mark.parametrize("text", ["superlinear", "dma(window=64)"])
def test_pairs_and_seconds_for_each_length(text):
    pace = Pace(repeats=1, budget=1e9)
    found = trained.measure(text, [256, 1024], HEADS, pace, 100)
    assert [row["length"] for row in found["lengths"]] == [256, 1024]
    assert found["exponents"]["dense_pairs"] == pytest.approx(2, abs=0.01)
    assert found["exponents"]["pairs"] < 1.6
    assert all(row["seconds"] > 0 for row in found["lengths"])
    rows = found["lengths"]
    if text == "dma(window=64)":
        assert [row["pairs"] for row in rows] == [64 * n - 63 * 32 for n in (256, 1024)]


def test_the_command_says_json(capsys):
    given = ["superlinear", "--lengths", "64", "128", "--head-dim", "8", "--repeats", "1",
             "--check", "64"]  # fmt: skip
    threads = torch.get_num_threads()
    assert trained.main(given) == 0
    torch.set_num_threads(threads)
    assert json.loads(capsys.readouterr().out)["method"] == "superlinear"


def test_a_wrong_output_gives_no_seconds(monkeypatch):
    from foveate.methods.superlinear import MultiStep

    forward = MultiStep.forward

    def wrong(self, q, k, v, ctx=None):
        result = forward(self, q, k, v, ctx)
        return result._replace(out=result.out + (0.1 if q.dtype == torch.float32 else 0.0))

    monkeypatch.setattr(MultiStep, "forward", wrong)
    with pytest.raises(FoveateError, match="no seconds"):
        trained.measure("superlinear", [64, 128], HEADS, Pace(repeats=1), 64)


def test_methods_without_parameters_are_refused():
    with pytest.raises(InputError, match="isn't an attention that is trained"):
        trained.measure("full", [64, 128], HEADS, Pace(repeats=1), 64)


def test_exponents_are_slopes():
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    for lengths, work in (([4], [4]), ([4, 4], [1, 2]), ([4, 8], [0, 2]), ([4, 8], [1, 2, 3])):
        with pytest.raises(InputError, match="two or more different lengths"):
            exponent(lengths, work)
