"""The documentation site's made pages: one for each row, true, and whole. test.sh builds it all."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest

import foveate
from foveate import catalog, papers
from foveate.papers.harness.table import kept_verdicts

ROOT = Path(__file__).resolve().parent.parent
for package in ("griffe", "PIL", "typer"):
    pytest.importorskip(package)
sys.path.insert(0, str(ROOT / "scripts" / "site"))
import method_pages  # noqa: E402
import method_use  # noqa: E402
import pictures  # noqa: E402
import reference  # noqa: E402
import shared  # noqa: E402
import typer  # noqa: E402

from foveate.cli import main  # noqa: E402
from foveate.cli.app import build  # noqa: E402
from foveate.ops.errors import InputError  # noqa: E402

sys.path.pop(0)
KEPT = kept_verdicts(ROOT / "benchmarks" / "results" / "claims")
FLAGS = re.MULTILINE | re.DOTALL
TRAINED = [row for row in catalog.rows() if "train" in row.jobs]
ROWS = pytest.mark.parametrize("row", catalog.rows(), ids=catalog.keys())


@ROWS
def test_page_of_a_method_is_whole(row):
    text = method_pages.page(row, KEPT, None)
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    for heading in ("Definition", "Use it", "What it can do", "What is claimed"):
        assert heading in headings
    for field, label in method_pages.CAPABILITIES.items():
        can = getattr(row.capabilities, field)
        assert f"| {label} | {'yes' if can.works else '**no**'} |" in text
    for paper in row.papers:
        assert paper.url in text
    assert "see the module's text" not in text
    if row.miniature in KEPT:
        assert f"**{KEPT[row.miniature]['verdict']}**, seeds" in text
        borrowed = f"the claim of the paper `{row.miniature}`, among whose methods" in text
        assert borrowed == (row.key != row.miniature)
    elif row.miniature in papers.available():
        assert f"Not run yet: `foveate reproduce {row.miniature}`" in text


@ROWS
def test_hyper_parameters_are_explained(row):
    lines = method_pages.hyper_parameters(row.load()).splitlines()[2:]
    unexplained = [line for line in lines if line.endswith("|  |")]
    assert not unexplained
    assert not re.search(r"\| see `[A-Z]\w+`\. \|$", "\n".join(lines), re.MULTILINE)


@ROWS
def test_python_of_a_page_runs_and_shows_a_use(row):
    code = method_use.snippet(row)
    if row.kind in ("mixer", "pooler", "router") or "train" in row.jobs:
        assert "make(" not in code
    assert f'"{row.key}' in code


@ROWS
def test_commands_of_a_page_are_known(row):
    app = typer.main.get_command(build())
    for block in re.findall(r"^```sh\n(.*?)^```", "\n\n".join(method_use.use(row)), FLAGS):
        _, name, *args = shlex.split(block)
        assert app.commands[name].make_context(name, args)
    for line in re.findall(r"reached from .*", "\n".join(method_use.use(row))):
        for command, *more in map(str.split, re.findall(r"`foveate ([\w ]+)`", line)):
            assert command in app.commands
            assert all(one in app.commands[command].commands for one in more)


@ROWS
def test_a_page_that_shows_python_alone_shows_a_command_too(row):
    parts = list(method_use.use(row))
    if any("make(" in part for part in parts):
        assert any(part.startswith("```sh") for part in parts)


@pytest.mark.parametrize("row", TRAINED, ids=[row.key for row in TRAINED])
def test_train_command_of_a_page_makes_a_model_with_it(row, monkeypatch):
    job = pytest.importorskip("foveate.papers.training.job")
    built = []

    def stop(made, tell, say):
        built.append(job._model(made).config)
        raise InputError("enough")

    monkeypatch.setattr(job, "run", stop)
    options = shlex.split(method_use.composition(row))
    main(["train", *options, "--layers", "2", "--dim", "64", "--heads", "4"])
    assert row.key in str(built[0].to_dict())


def test_patterns_have_pictures():
    bare = []
    for row in catalog.rows():
        if row.kind == "pattern" and pictures.draw(row) is None:
            bare.append(row.key)
    assert set(bare) <= {"snapkv", "h2o"}, (
        "they keep all pairs, or must be fitted: give a SPECS entry"
    )


def test_a_picture_shows_its_layout():
    made = pictures.draw(catalog.get("sink-window"))
    image = pictures.Image.open(pictures.io.BytesIO(made.png)).convert("RGB")
    at = lambda q, k: image.getpixel((int(k * image.width), int(q * image.height)))  # noqa: E731
    assert at(0.9, 0.001) == at(0.9, 0.89) == pictures.SEEN  # the sink; the window
    assert at(0.9, 0.4) == pictures.ALLOWED
    assert at(0.4, 0.9) == pictures.HIDDEN
    assert "39%" in made.caption


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("s_i * s_j [CLS] <a>", r"s\_i \* s\_j \[CLS\] &lt;a>"),
        ("see `a_b * c`", "see `a_b * c`"),
        ("rule:\n    x_i = y\nend", "rule:\n\n    x_i = y\n\nend"),
    ],
)
def test_docstrings_are_no_markup_but_code(told, shown):
    assert method_pages.prose(told) == shown


def test_every_public_name_is_in_the_reference():
    text = "\n".join(reference.pages().values())
    for name in foveate.__all__:
        value = getattr(foveate, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert f"::: {value.__module__}.{value.__qualname__}\n" in text + "\n"
    shown = re.findall(r"^::: (.*)$", text, re.MULTILINE)
    assert len(shown) == len(set(shown)) > 100


def test_every_command_is_in_the_reference():
    text = reference.commands()
    for command in ("compare", "claims", "reproduce", "cost decode", "bench kernels", "methods"):
        assert f"`foveate {command}`" in text


def test_shared_texts_are_found_and_their_links_moved():
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert not shared.LINE.search(shared.filled(page.read_text(encoding="utf-8"), name))
    assert len(set(shared.PLACES.values())) >= 4 + len(shared.PICTURES)
    shown = re.findall(r"!\[.*?\]\((.*?)\)", shared.filled("--8<-- benchmarks/README.md", "p.md"))
    assert shown
    assert set(shown) <= set(shared.PICTURES)
    guide = shared.filled("--8<-- README.md: Check a claim", "guides/reader.md")
    assert "[docs/claims.md](../claims.md)" in guide


def test_every_part_of_the_readme_is_in_the_site():
    told = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    headings = re.findall(
        r"^## (.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    shown = [name for name in headings if f"--8<-- README.md: {name}\n" in told + "\n"]
    assert [name for name in headings if name not in shown] == ["Methods", "Read on", "Develop"]


def test_names_in_the_readme_are_in_the_reference():
    text = "\n".join(reference.pages().values())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = []
    for path in sorted(set(re.findall(r"`(foveate(?:\.\w+)+)", readme))):
        module, _, name = path.rpartition(".")
        above = importlib.import_module(module)
        value = getattr(above, name, None) or importlib.import_module(path)
        if inspect.isclass(value) or inspect.isfunction(value):
            missing += [path] * (
                f"::: {value.__module__}.{value.__qualname__}\n" not in text + "\n"
            )
    assert not missing


def test_shared_texts_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="no heading '## Nothing'"):
        shared.filled("--8<-- README.md: Nothing", "index.md")
    with pytest.raises(ValueError, match="no place in the site"):
        shared.moved("no-such-file.md", "README.md", "index.md")


def test_files_that_shared_texts_link_to_come_along():
    assert shared.moved("LICENSE", "README.md", "guides/reader.md") == "../files/LICENSE"
    found = shared.attached()
    assert found["files/LICENSE"] == ROOT / "LICENSE"
    assert "files/benchmarks/README.md" not in found  # a page of its own
