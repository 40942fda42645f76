"""The planner's totals against the ones that VMoBA's authors print (oracle 9 of its spec)."""

import json

import pytest

from foveate.cli import main
from foveate.cost.video import MODELS, VideoModel
from foveate.ops.errors import InputError


@pytest.mark.parametrize(
    ("tokens", "tera"),
    [(55_296, 705.02), (56_160, 724.97), (75_600, 1246.79), (13_440, 67.73), (32_760, 281.64)],
)
def test_oracle_9_dense_totals(tokens, tera):
    assert MODELS["wan-1.3b"].flops(tokens) / 1e12 == pytest.approx(tera, abs=0.005)


def test_oracle_9_sparse_totals():
    wan = MODELS["wan-1.3b"]
    assert wan.flops(55_296, 0.19, (8, 48, 72)) / 1e12 == pytest.approx(248.7, abs=0.05)
    assert wan.flops(56_160, 0.18, (7, 24, 36)) / 1e12 == pytest.approx(248.39, abs=0.05)
    assert wan.flops(55_296) / wan.flops(55_296, 0.19, (8, 48, 72)) == pytest.approx(2.83, abs=5e-3)


def test_by_hand():
    model = VideoModel(layers=2, width=3, feedforward=5, text=4)
    layer = 8 * 7 * 9 + 4 * 49 * 3 / 2 + 4 * 7 * 9 + 4 * 4 * 9 + 4 * 7 * 4 * 3 + 4 * 7 * 3 * 5
    assert model.flops(7, 0.5, (1, 2, 3)) == 2 * layer + 2 * 7 * 3 * (1 + 2)


def test_bad_sizes_are_refused():
    with pytest.raises(InputError):
        VideoModel(layers=0, width=3, feedforward=5)
    with pytest.raises(InputError):
        MODELS["wan-1.3b"].flops(0)


def test_the_command(capsys):
    assert main(["cost", "video", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 55_296
    assert [round(row["tera"], 1) for row in found["rows"]] == [705.0, 248.7]
    assert main(["cost", "video", "--tokens", "100", "--layers", "2", "--density", "0.1,0.5"]) == 0
    assert "100 tokens" in capsys.readouterr().out
    for bad in (["--tokens", "3x"], ["--density", "2"], ["--density", "a"], ["--model", "wan"]):
        assert main(["cost", "video", *bad]) == 2
