"""The README tells the truth: its Python runs, its commands and links exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from foveate import catalog
from foveate.cli import main

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def tiny_model() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_readmes_python_runs_and_is_true():
    names = {"model": tiny_model(), "ids": torch.randint(64, (1, 20))}
    found = blocks("README.md", "python")
    assert len(found) >= 4
    for block in found:
        exec(block, names)
    foveate, q, k, v = (names[name] for name in ("foveate", "q", "k", "v"))
    whole = foveate.attention(q, k, v, foveate.causal(), backend="reference")
    torch.testing.assert_close(names["both"].out, whole.out)
    torch.testing.assert_close(names["both"].lse, whole.lse)
    mask = foveate.causal() & (foveate.window(255, 0) | foveate.sinks(4))
    expected = foveate.attention(q, k, v, mask, backend="reference")
    torch.testing.assert_close(names["out"], expected.out)


def test_readmes_masks_are_those_of_the_library():
    from foveate.ops.masks.parse import MAKERS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\| `(\w+)\(", text, flags=re.MULTILINE))
    assert shown == set(MAKERS)


def test_readmes_explain_command_runs(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"`foveate (explain [^`]*)`", text)
    assert commands
    for command in commands:
        assert main(shlex.split(command.replace("\n", " "))) == 0
        assert "pairs" in capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    commands = re.findall(r"^sh (\S+)", "".join(blocks(document, "sh")), flags=re.MULTILINE)
    paths = re.findall(r"`((?:src|tests|scripts)/[^`]*)`", text)
    paths = [path for path in paths if "sparse_transformer" not in path]  # the worked example's
    assert links + commands
    for name in links + commands + paths:
        assert (ROOT / name).exists(), f"{document} names {name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_methods_that_are_adopted_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for key in re.findall(r'foveate\.use\(model, "([a-z0-9-]+)', text):
        assert catalog.get(key).key == key
