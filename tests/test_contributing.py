"""CONTRIBUTING's worked example, run as it stands: file, row and test make a whole method."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import foveate
from foveate import catalog
from foveate.cli import main

TEXT = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The example's method, in place; its row and its test's source."""
    mechanism, row, test = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    name = re.search(r"`src/foveate/methods/(\w+)\.py`", TEXT)[1]
    file = tmp_path / f"{name}.py"
    file.write_text(mechanism)
    spec = importlib.util.spec_from_file_location(f"foveate.methods.{name}", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    made = eval(row, vars(catalog))
    monkeypatch.setattr(catalog, "ROWS", (*catalog.ROWS, made))
    return made, test


def test_its_own_tests_pass(added):
    names: dict = {}
    exec(added[1], names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) >= 2
    for test in tests:
        test()


def test_it_is_reached_by_its_key(added, capsys):
    row, _ = added
    assert foveate.catalog.get(row.key) is row
    assert main(["methods", row.key]) == 0
    assert "stride=128" in capsys.readouterr().out
    assert f"`{row.key}`" in catalog.markdown_table()


def test_it_works_in_a_model(added):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(64, (1, 40))
    with torch.no_grad():
        dense = model(ids).logits
        with foveate.use(model, f"{added[0].key}(stride=1)"):
            same = model(ids).logits
        with foveate.use(model, f"{added[0].key}(stride=4)"):
            sparse = model(ids).logits
    torch.testing.assert_close(same, dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sparse[:, :4], dense[:, :4], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(sparse, dense, atol=1e-4)
