"""The command line: what it prints, its exit codes, and that errors are one clean message."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import foveate
from foveate import catalog
from foveate.cli import main
from foveate.cli.methods import hyper_parameters


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process: (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*args: str) -> tuple[int, str, str]:
        code = main(args)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_version(run):
    assert run("--version") == (0, f"foveate {foveate.__version__}\n", "")


def test_installed_command_runs_main():
    installed = entry_points(group="console_scripts", name="foveate")
    if not installed:
        pytest.skip("foveate runs from its source folder here, it isn't installed")
    assert [entry.load() for entry in installed] == [main]


def test_help_names_the_commands(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("compare", "methods", "explain"):
        assert command in out


def test_methods_lists_every_key(run):
    code, out, _ = run("methods")
    assert code == 0
    for row in catalog.rows():
        assert row.key in out
        assert row.summary in out


def test_methods_json(run):
    code, out, _ = run("methods", "--json")
    assert code == 0
    assert [row["key"] for row in json.loads(out)] == list(catalog.keys())


@pytest.mark.parametrize("key", catalog.keys())
def test_one_method(run, key):
    row = catalog.get(key)
    code, out, _ = run("methods", key)
    assert code == 0
    assert row.path in out
    for name, value in hyper_parameters(row.load()).items():
        assert f"{name}={value!r}" in out
    for paper in row.papers:
        assert paper.arxiv in out


def test_one_method_json_holds_its_defaults(run):
    code, out, _ = run("methods", "sink-window", "--json")
    assert code == 0
    fields = json.loads(out)["hyper_parameters"]
    assert (fields["sinks"], fields["window"]) == (4, 1024)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("methods", "sink-windo"), "did you mean 'sink-window'?"),
        (("explain", "--mask", "causl()"), "did you mean 'causal'?"),
        (("explain", "--mask", "causal() &"), "is not a mask expression"),
        (("explain", "--dtype", "int8"), "--dtype int8 is not known"),
        (("explain", "--device", "abacus"), "--device abacus is not known"),
        (("explain", "--kv-len", "0"), "--kv-len must be at least 1, got 0"),
        (("explain", "--heads", "9", "--kv-heads", "2"), "not a multiple"),
        (("explain", "--backend", "refrence"), "'reference'"),
    ],
)
def test_bad_input_is_one_message_and_code_2(run, args, said):
    code, out, err = run(*args)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert "Traceback" not in err


def test_unknown_option_is_code_2(run):
    code, _, err = run("explain", "--bogus")
    assert code == 2
    assert "--bogus" in err


def test_explain_agrees_with_the_library(run):
    text = "causal() & (window(63, 0) | sinks(4))"
    code, out, _ = run(
        "explain", "--mask", text, "--kv-len", "300", "--q-len", "200", "--heads", "6",
        "--kv-heads", "2", "--head-dim", "32", "--json",
    )  # fmt: skip
    assert code == 0
    facts = json.loads(out)
    query = torch.zeros(1, 6, 200, 32)
    key = torch.zeros(1, 2, 300, 32)
    mask = foveate.parse_mask(text)
    expected = foveate.explain(query, key, key, mask)
    assert facts["backend"] == expected.backend
    assert facts["reasons"] == expected.reasons
    assert foveate.parse_mask(facts["mask"]) == mask
    assert facts["layout"]["pairs"] == mask.dense(200, 300).sum().item()
    assert facts["layout"]["tile_area"] >= facts["layout"]["pairs"]
    assert facts["environment"]["torch"] == torch.__version__


def test_explain_shows_each_backend_and_the_counts(run):
    code, out, _ = run("explain", "--mask", "causal()", "--kv-len", "1000")
    assert code == 0
    assert "500,500" in out
    for name in foveate.ops.available():
        assert name in out


def test_explain_a_forced_backend(run):
    code, out, _ = run("explain", "--backend", "reference", "--kv-len", "64", "--json")
    assert code == 0
    assert json.loads(out)["backend"] == "reference"


def test_explain_counts_the_gradient(run):
    code, _, err = run("explain", "--backend", "flex", "--kv-len", "64", "--grad")
    if torch.cuda.is_available():
        pytest.skip("FlexAttention has a backward on a GPU")
    assert code == 2
    assert "backward" in err


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(missing):
    code = (
        f"import sys\nsys.modules[{missing!r}] = None\n"
        "from foveate.cli import main\nsys.exit(main([]))"
    )
    source = Path(foveate.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=source)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip() == (
        "The foveate command needs typer and rich: pip install 'foveate[cli]'"
    )


@pytest.mark.parametrize("args", [["--version"], ["methods"], ["explain", "--kv-len", "64"]])
def test_commands_that_need_no_model_run_without_the_hf_extra(args):
    code = (
        "import sys\nfor name in ('transformers', 'safetensors', 'matplotlib', 'gguf'):\n"
        "    sys.modules[name] = None\n"
        f"from foveate.cli import main\nsys.exit(main({args!r}))"
    )
    source = Path(foveate.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=source)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_compare_without_the_hf_extra_says_what_to_install():
    code = (
        "import sys\nsys.modules['transformers'] = None\n"
        "from foveate.cli import main\nsys.exit(main(['compare']))"
    )
    source = Path(foveate.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=source)
    assert done.returncode == 2
    assert "pip install 'foveate[hf]'" in done.stderr
    assert "Traceback" not in done.stderr
