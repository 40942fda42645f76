"""`foveate reproduce` from the outside, and the page of claims."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from toys import paper

import foveate
from foveate import papers
from foveate.cli import main
from foveate.cli.reproduce import arms
from foveate.ops.errors import InputError
from foveate.papers.harness.run import Run
from foveate.papers.harness.table import kept_verdicts, markdown

ROOT = Path(foveate.__file__).resolve().parents[2]


@pytest.fixture
def toys(monkeypatch):
    """Three miniatures in place of the real ones: one that holds, one refuted, one that fails."""

    def broken(trial):
        raise InputError("this one is broken")

    made = {
        "good": paper(key="good"),
        "bad": paper(key="bad", gap=0.2),
        "broken": paper(key="broken", run=broken),
    }
    monkeypatch.setattr(papers, "available", lambda: tuple(sorted(made)))
    monkeypatch.setattr(papers, "load", made.__getitem__)
    return made


@pytest.fixture
def run(capsys, tmp_path):
    def call(*args):
        code = main(["reproduce", *args, "--out", str(tmp_path)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_json_is_one_object_a_line(run, toys):
    code, out, err = run("good", "bad", "--json")
    assert code == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [(one["key"], one["verdict"]) for one in found] == [
        ("good", "holds"),
        ("bad", "refuted"),
    ]
    assert "6 of 6" in err


def test_people_see_arms_checks_and_files(run, toys, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, _ = run("bad")
    assert code == 0
    for said in ("loss(ours) - loss(dense) <= 0.03", "counted", "bad: refuted", "± 0.2"):
        assert said in out
    for name in ("results.jsonl", "verdict.json", "figure.png"):
        assert (tmp_path / "bad" / name).exists()
        assert name in out
    assert (tmp_path / "bad" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_runs_nothing(run, toys):
    run("good")
    code, out, err = run("good", "--json")
    assert code == 0
    assert json.loads(out)["verdict"] == "holds"
    assert " of 6" not in err


def test_quick_says_that_it_decides_nothing(run, toys):
    _, out, _ = run("good", "--quick")
    assert "good: inconclusive (a quick run decides nothing but what is counted)" in out
    assert "one seed" in out


def test_one_that_fails_does_not_stop_the_others(run, toys):
    code, out, err = run("--all", "--json")
    assert code == 2
    assert [json.loads(line)["key"] for line in out.splitlines()] == ["bad", "good"]
    assert "error: this one is broken" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "Give the papers' keys, or --all; there are bad, broken, good."),
        (("good", "--all"), "leave out good"),
        (("goood",), "No miniature has the key 'goood'; did you mean 'good'?"),
        (("good", "--threads", "0"), "--threads 0: expected 1 or more"),
        (("good", "--device", "abacus"), "--device abacus is not known"),
    ],
)
def test_bad_input_is_one_message_and_no_work(run, toys, tmp_path, args, said):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert said in err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_refused_before_any_work(capsys, toys, tmp_path):
    (tmp_path / "file").write_text("x")
    assert main(["reproduce", "good", "--out", str(tmp_path / "file")]) == 2
    assert "lies under a file" in capsys.readouterr().err


def test_importing_the_command_brings_nothing_heavy():
    code = (
        "import sys\nfrom foveate.cli.app import build\nbuild()\n"
        "print(*{n.partition('.')[0] for n in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "src"
    )
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"matplotlib", "transformers", "safetensors"}


@pytest.mark.parametrize("key", ["step3", "tpla"])
def test_without_the_hf_extra_it_says_what_to_install_before_any_work(key, tmp_path):
    code = (
        "import sys\nsys.modules['transformers'] = None\nfrom foveate.cli import main\n"
        f"sys.exit(main(['reproduce', {key!r}, '--quick', '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "src"
    )
    assert done.returncode == 2
    assert f"The miniature of {key} needs transformers: pip install 'foveate[hf]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_real_miniature_states_itself():
    for key in papers.available():
        made = papers.load(key)
        assert made.key == key
        assert made.holds_if
        assert len(made.seeds) >= 3
        assert made.baseline
        assert made.ours


def test_the_page_of_claims_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "scripts/update_claims.py", "--check"],
        capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": "src", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_time_left_counts_only_what_this_run_did(monkeypatch):
    from foveate.cli import progress

    clock = iter([0.0, 30.0, 60.0])
    monkeypatch.setattr(progress, "perf_counter", lambda: next(clock))
    screen = progress.Screen()
    screen.begin("toy", 10)
    for done in range(1, 6):  # found from an earlier run
        screen.skip()
        screen.advance(done, "")
    assert screen.left() == ""
    screen._done = 5.5
    assert screen.left() == "4:30 left"  # half a part in 30 s, 4.5 to go
    screen._done = 8.0
    assert screen.left() == "0:40 left"
    screen._done = 10.0
    assert screen.left() == ""


@pytest.fixture
def kept(tmp_path):
    """A verdict in a folder, as the page reads it."""
    with Run(paper(), tmp_path / "out") as ready:
        verdict = ready().verdict
    (tmp_path / "kept").mkdir()
    path = tmp_path / "kept" / "toy.json"
    path.write_text(json.dumps(verdict))
    return path


def test_the_page_tells_kept_verdicts_and_those_that_are_missing(kept):
    text = markdown([paper(), paper(key="other")], kept_verdicts(kept.parent))
    assert "| [toy](#toy) | **holds** | A toy loses next to nothing. |" in text
    assert "| [other](#other) | not run yet |" in text
    assert "| loss(ours) - loss(dense) <= 0.03 | 0.01 | 0.008314 to 0.01169 | holds |" in text
    assert "| dense | 1.7 ± 0.2 |" in text
    assert "Not run yet: `foveate reproduce other`." in text
    assert "data: generated" in text


def test_a_threshold_that_was_changed_after_the_run_shows(kept):
    from foveate.papers.harness import at_most

    other = at_most("loss(ours) - loss(dense)",
                    lambda at: at["ours"]["loss"] - at["dense"]["loss"], 0.5)  # fmt: skip
    with pytest.raises(InputError, match="the miniature's holds_if is .* run it again"):
        markdown([paper(checks=(other,))], kept_verdicts(kept.parent))


def test_a_verdict_that_its_figures_do_not_give_shows(kept):
    verdict = json.loads(kept.read_text()) | {"verdict": "refuted"}
    kept.write_text(json.dumps(verdict))
    with pytest.raises(InputError, match="its figures give 'holds' by today's rule"):
        markdown([paper()], kept_verdicts(kept.parent))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: "{", "is no JSON"),
        (lambda v: json.dumps({"key": "toy"}), "is no verdict; expected the fields key, claim"),
        (lambda v: json.dumps(v | {"key": "moh"}), "holds the verdict of moh; rename it"),
        (lambda v: json.dumps(v | {"environment": {"quick": True}}), "is of a quick run"),
    ],
)
def test_what_is_no_kept_verdict_is_refused(kept, change, said):
    kept.write_text(change(json.loads(kept.read_text())))
    with pytest.raises(InputError, match=said):
        kept_verdicts(kept.parent)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_figure_is_read_on_every_screen(width):
    rich = pytest.importorskip("rich.console")

    def figures(*names):
        return {
            name: {"mean": 1000 + i, "values": [1, 2], "sd": 0.5} for i, name in enumerate(names)
        }

    verdict = {
        "baseline": {"dense": figures("loss", "time"), "counts": figures("operations")},
        "ours": {"sparse": figures("loss", "time", *(f"metric number {i}" for i in range(9)))},
    }
    screen = rich.Console(width=width, record=True, file=io.StringIO())
    tables = 0
    for table in arms(verdict, width):
        screen.print(table)
        tables += 1
    text = screen.export_text()
    for i in range(9):
        assert f"metric number {i}" in text
        assert f"{1002 + i} ± 0.5" in text
    assert max(map(len, text.splitlines())) <= width
    assert text.count("loss") == 2
    assert text.count("operations") == 1
    assert text.split().count("dense") == 1
    assert text.split().count("sparse") == tables - 2
    assert {40: tables > 5, 80: 3 < tables < 9, 200: tables == 3}[width]
