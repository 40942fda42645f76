"""Methods that share or choose between layers, in a comparison on a whole model."""

from __future__ import annotations

import json

import pytest

from conftest import make_llama
from foveate.cli.app import run

METHODS = {
    "echoatt(followers=(1, 3))": True,
    "drrl(control='energy', r_min=4, r_max=16, step=4, segment=64)": True,
    "drrl(control='fixed', rank=16, segment=64)": False,  # of full rank: nothing is lost
}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("four"), num_hidden_layers=4)


def test_they_are_measured_and_checked(four, prose, tmp_path, capsys):
    args = [
        "compare", str(four), "--methods", ",".join(METHODS), "--lengths", "256", "--text",
        str(prose), "--out", str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    assert run(args) == 0
    capsys.readouterr()
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    found = {}
    for line in lines:
        record = json.loads(line)
        if record["values"].get("quality"):
            found[record["cell"]["method"]] = record["values"]
    assert len(found) == 3
    for name, loses in METHODS.items():
        values = next(
            v for key, v in found.items() if key.replace(" ", "") == name.replace(" ", "")
        )
        quality = values["quality"]
        assert (quality["kl"] / quality["tokens"] > 1e-4) is loses, name
        assert values["seconds"] > 0
        if values.get("check"):
            assert not values["check"]["problems"], values["check"]
