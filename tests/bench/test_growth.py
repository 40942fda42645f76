"""The bench of how time grows with the length."""

from __future__ import annotations

import json

import pytest

from foveate.bench import growth
from foveate.ops.errors import FoveateError
from foveate.parts import Heads


def test_it_times_methods_beside_dense_attention(capsys):
    methods = ["combiner(size={root})", "sea(k=8, width=16, max_length=512)", "sink-window"]
    sizes = ["--shortest", "64", "--longest", "128", "--heads", "2", "--dim", "16"]
    assert growth.main([*methods, *sizes, "--repeats", "1", "--check", "64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["seconds"]) == {"full", *methods}
    for held in found["seconds"].values():
        assert held["64"]["median"] > 0
        assert held["128"]["median"] > 0
        assert held["exponent"] is not None
        assert held["error"] <= growth.TOLERANCE


def test_a_wrong_output_has_no_speed(monkeypatch):
    heads = Heads(32, 2, 2, 16, 16)
    monkeypatch.setattr(growth, "TOLERANCE", 0.0)
    with pytest.raises(FoveateError, match="no speed"):
        growth.check("combiner(size=8)", heads, 64)
