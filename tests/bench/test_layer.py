"""`python -m foveate.bench.layer`: one layer by a method, checked before it is timed."""

import json

import pytest
import torch

from foveate.bench import layer
from foveate.ops.errors import FoveateError
from foveate.runs.timing import Pace

METHOD = "hyperattention(block_size=16, sample_size=16, min_seq_len=64)"


def test_it_measures_speed_and_error(capsys):
    threads = torch.get_num_threads()
    given = [METHOD, "--length", "512", "--repeats", "2", "--check", "300", "--threads", "1"]
    assert layer.main(given) == 0
    torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert found["times_faster"]["median"] == pytest.approx(
        found["dense_seconds"]["median"] / found["seconds"]["median"], rel=1.0
    )
    assert 0.01 < found["relative_error"] < 1
    assert (found["data"], found["length"], found["heads"]) == ("clustered", 512, 1)


def test_an_exact_method_has_no_error():
    q, k, v, scale = layer.clustered(300, 2, 0)
    found = layer.measure("full", q, k, v, scale, Pace(repeats=1), 200)
    assert found["relative_error"] < 1e-6


def test_a_wrong_output_has_no_speed(monkeypatch):
    monkeypatch.setattr(layer, "TOLERANCE", -1.0)
    q, k, v, scale = layer.clustered(300, 1, 0)
    with pytest.raises(FoveateError, match="no speed"):
        layer.measure(METHOD, q, k, v, scale, Pace(repeats=1), 200)
