"""The whole command on a tiny model: table, files, answer; killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foveate.cli import main
from foveate.compare.plan import Plan
from foveate.compare.run import fingerprint

METHODS = "full,sink-window(window=64),a-shape(sinks=8, local=64),vertical-slash(verticals=30, slashes=50),block-sparse(blocks=2)"  # noqa: E501
ROOT = Path(__file__).resolve().parents[2]


def arguments(tiny, prose, out, *more):
    return ["compare", str(tiny), "--text", str(prose), "--lengths", "256,512", "--methods",
            METHODS, "--out", str(out), "--threads", "1", *more]  # fmt: skip


def start(args):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "foveate.cli", *args],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def records(out):
    path = out / "results.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def whole(tiny, prose, tmp_path_factory):
    """One finished run; (folder, standard output, standard error)."""
    out = tmp_path_factory.mktemp("whole")
    process = start(arguments(tiny, prose, out))
    printed, said = process.communicate(timeout=280)
    assert process.returncode == 0, said
    return out, printed, said


def test_it_prints_a_row_for_every_method_and_length_and_an_answer(whole):
    out, printed, said = whole
    for name in ("full", "sink-window", "a-shape", "vertical-slash", "block-sparse"):
        assert printed.count(name) >= 2
        assert sum(line.lstrip().startswith(("256  " + name, "512  " + name))
                   for line in said.splitlines()) == 2  # fmt: skip
    assert "FAILED" not in printed
    assert "tokens stay dense" in printed or "Use " in printed
    assert "left]" in said


def test_every_cell_is_one_record_and_the_full_method_equals_dense(whole):
    out, _, _ = whole
    found = [json.loads(line) for line in records(out)]
    assert len(found) == len({r["key"] for r in found}) == 5 * 2 * 3
    for record in found:
        values = record["values"]
        assert values["seconds"] > 0
        assert values["dense_seconds"] > values["dense_attention_seconds"] > 0
        assert values["decode_seconds"] > 0
        assert values["quality"]["tokens"] > 100
        assert len(values["needle"]["keys"]) == 1
        assert values["area"] >= values["pairs"] > 0
        if record["cell"]["method"] == "full":
            assert values["quality"]["agree"] == values["quality"]["tokens"]
            assert values["area"] == values["mask_area"]
        else:
            assert values["quality"]["kl"] > 0
            assert values["pairs"] < values["mask_pairs"]
        assert ("check" in values) == (record["cell"]["pass"] == 0)
    depths = {r["cell"]["pass"]: r["values"]["needle"]["depths"] for r in found}
    assert depths == {0: [0.1], 1: [0.5], 2: [0.9]}


def test_dense_stands_before_and_after_in_turn(whole):
    came = {}
    for line in records(whole[0]):
        record = json.loads(line)
        came.setdefault(record["cell"]["method"], set()).add(record["values"]["dense_came"])
    assert all(sides == {"before", "after"} for sides in came.values())


def test_the_files(whole):
    out, printed, _ = whole
    table = (out / "table.md").read_text()
    assert table.count("\n| 256 |") == table.count("\n| 512 |") == 5
    page = (out / "report.html").read_text()
    assert "http-equiv" in page
    for word in ("<script", "http://", "https://", "@import", '<link rel="stylesheet'):
        shown = page.replace('xmlns="http://www.w3.org/2000/svg"', "").replace(
            'xmlns:xlink="http://www.w3.org/1999/xlink"', ""
        )
        assert word not in shown
    assert not list(out.glob(".*.new"))
    for name in ("results.jsonl", "table.md", "report.html"):
        assert str(out / name) in printed


def test_the_printed_python_runs_as_it_is(whole):
    _, printed, _ = whole
    lines = printed.splitlines()
    begin = next(i for i, x in enumerate(lines) if x.startswith(("import foveate", "from trans")))
    code = "\n".join(lines[begin : lines.index("", begin)])
    assert "from_pretrained" in code
    check = "\nimport torch\nprint(tuple(model(torch.arange(40)[None]).logits.shape))"
    done = subprocess.run(
        [sys.executable, "-c", code + check], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("(1, 40, 256)")


def test_killed_at_any_moment_it_goes_on_and_measures_nothing_twice(whole, tiny, prose, tmp_path):
    out = tmp_path / "killed"
    before = []
    for wanted in (1, 9, 20):
        process = start(arguments(tiny, prose, out))
        deadline = time.monotonic() + 200
        while len(records(out)) < wanted and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        now = records(out)
        assert wanted <= len(now) < 30
        assert now[: len(before)] == before
        before = [line for line in now if line.endswith("}")]
    process = start(arguments(tiny, prose, out))
    _, said = process.communicate(timeout=280)
    assert process.returncode == 0, said
    assert "were measured before" in said
    after = records(out)
    assert after[: len(before)] == before
    keys = [json.loads(line)["key"] for line in after]
    assert len(keys) == len(set(keys)) == 30
    # what doesn't depend on the clock is the same as of the run that nothing stopped
    assert set(keys) == {json.loads(line)["key"] for line in records(whole[0])}
    theirs = {json.loads(x)["key"]: json.loads(x)["values"] for x in records(whole[0])}
    for line in after:
        record = json.loads(line)
        for name in ("quality", "needle", "area", "pairs", "cache_bytes"):
            assert record["values"][name] == theirs[record["key"]][name]

    # finished: the next start only reads, and shows the same table and answer
    table = (out / "table.md").read_text()
    process = start(arguments(tiny, prose, out))
    printed, said = process.communicate(timeout=200)
    assert "30 of 30 cells were measured before" in said
    assert "Loading" not in said
    assert records(out) == after
    assert (out / "table.md").read_text() == table


def test_json_and_another_setting_measures_anew(tiny, prose, tmp_path, capsys):
    args = ["compare", str(tiny), "--text", str(prose), "--lengths", "128", "--methods", "full",
            "--out", str(tmp_path), "--repeats", "1", "--needle-depths", "none",
            "--decode-tokens", "0", "--json"]  # fmt: skip
    assert main(args) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["measured"], first["found"]) == (1, 0)
    assert first["rows"][0]["decode"] is None
    assert first["rows"][0]["hidden"] == 0
    assert first["recommendation"]["use"] in ("full", "dense")
    assert main(args) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["measured"], again["found"]) == (0, 1)
    assert again["rows"] == first["rows"]
    assert main([*args, "--batch", "2"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert (other["measured"], other["found"]) == (1, 0)
    assert main([*args, "--fresh"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"] == 1
    assert len(list(tmp_path.glob("results.old-*.jsonl"))) == 1


def test_bfloat16_in_batches(tiny, prose, tmp_path, capsys):
    args = ["compare", str(tiny), "--text", str(prose), "--lengths", "200", "--methods",
            "full,sink-window(window=40),vertical-slash(verticals=30)", "--out", str(tmp_path),
            "--repeats", "2", "--needle-depths", "0.5", "--batch", "2", "--dtype", "bf16",
            "--decode-tokens", "8", "--json"]  # fmt: skip
    assert main(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["passed"] for row in found["rows"]] == [True] * 3, found["rows"]
    assert all(row["hidden"] == 4 for row in found["rows"])
    assert found["run"]["dtype"] == "bfloat16"


def test_bad_input_is_one_message_and_code_2(tiny, prose, tmp_path, capsys):
    code = main(["compare", str(tiny), "--text", str(prose), "--lengths", "1025", "--out",
                 str(tmp_path)])  # fmt: skip
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("error: ")
    assert "1024 positions" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("lengths", [None, "100,300"])
def test_a_text_encoder(tmp_path, tiny_bert, prose, lengths, capsys):
    folder = tiny_bert
    args = ["compare", str(folder), "--text", str(prose), "--methods",
            "full,sink-window(window=50),block-sparse(blocks=2)", "--repeats", "1", "--out",
            str(tmp_path / "out"), "--json"]  # fmt: skip
    assert main(args + (["--lengths", lengths] if lengths else [])) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert {row["length"] for row in rows} == ({100, 300} if lengths else {128, 256, 512})
    for row in rows:
        assert row["passed"], row["said"]
        assert row["kl"] is row["decode"] is row["loss"] is None
        if row["method"] == "full":
            assert row["cosine"] == pytest.approx(1, abs=1e-5)
            assert row["state_error"] < 1e-5
    assert any(row["cosine"] < 0.9999 for row in rows)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "cosine" in page


def test_an_encoder_refuses_methods_that_are_causal(tiny_bert, prose, tmp_path, capsys):
    args = ["compare", str(tiny_bert), "--text", str(prose), "--out", str(tmp_path)]
    assert main([*args, "--methods", "full,vertical-slash"]) == 2
    said = capsys.readouterr().err
    assert "vertical-slash is for causal attention" in said
    assert "block-sparse" in said
    from foveate.compare.options import Options
    from foveate.compare.validate import validate

    job = validate(Options(model=str(tiny_bert), text=str(prose), out=str(tmp_path)))
    assert {e.key for e in job.entries} == {"full", "sink-window", "a-shape", "block-sparse"}


def test_a_method_that_cannot_run_is_told_before_anything_is_measured(
    tiny, prose, tmp_path, capsys, monkeypatch
):
    from foveate.methods.attention_sink import SinkWindow
    from foveate.ops.errors import InputError

    def refuse(self, *args):
        raise InputError("not with these heads.")

    monkeypatch.setattr(SinkWindow, "layout", refuse)
    args = ["compare", str(tiny), "--text", str(prose), "--lengths", "128", "--out", str(tmp_path),
            "--methods", "full,block-sparse(blocks=1),sink-window(window=9)"]  # fmt: skip
    assert main([*args, "--needle-depths", "none"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "sink-window(window=9) can't run on tiny" in said
    assert "not with these heads" in said
    assert records(tmp_path) == []


def test_a_method_that_decodes_wrongly_gets_no_speed(tiny, prose, tmp_path, capsys, monkeypatch):
    from foveate.methods.attention_sink import SinkWindow
    from foveate.ops import AttentionOutput
    from foveate.parts import Pattern

    def spoilt(self, q, k, v, ctx=None):
        right = Pattern.__call__(self, q, k, v, ctx)
        return AttentionOutput(right.out * 1.01, right.lse) if ctx.phase == "decode" else right

    monkeypatch.setattr(SinkWindow, "__call__", spoilt)
    args = ["compare", str(tiny), "--text", str(prose), "--lengths", "200", "--out", str(tmp_path),
            "--methods", "full,sink-window(window=40)", "--repeats", "1", "--decode-tokens", "4",
            "--json"]  # fmt: skip
    assert main([*args, "--needle-depths", "none"]) == 0
    full, window = json.loads(capsys.readouterr().out)["rows"]
    assert full["passed"]
    assert full["decode"] is not None
    assert not window["passed"]
    assert "off by" in window["said"]
    assert window["prefill"] is window["decode"] is None


def test_nothing_is_timed_before_it_has_run_once(tiny, prose, tmp_path, capsys, monkeypatch):
    """Dense at every length, each method once, decoding too: untimed, and before any figure."""
    from foveate.compare.measure import Machine

    timed: dict[tuple, list[bool]] = {}
    run, decode = Machine.run, Machine.decode

    def watched_run(self, inputs, method, *, inspect, **more):
        what = (repr(method), inputs.shape[1]) if method is None else (repr(method),)
        timed.setdefault(what, []).append(inspect)
        return run(self, inputs, method, inspect=inspect, **more)

    def watched_decode(self, method, tokens, cache, steps):
        timed.setdefault(("decode", repr(method)), []).append(steps != 2)
        return decode(self, method, tokens, cache, steps)

    monkeypatch.setattr(Machine, "run", watched_run)
    monkeypatch.setattr(Machine, "decode", watched_decode)
    args = ["compare", str(tiny), "--text", str(prose), "--lengths", "200,300", "--out",
            str(tmp_path), "--methods", "full,sink-window(window=40)", "--repeats", "1",
            "--decode-tokens", "4", "--json"]  # fmt: skip
    assert main([*args, "--needle-depths", "none"]) == 0
    assert len(timed) == 2 + 2 + 3
    for what, passes in timed.items():
        assert passes[0] is False, what
        assert True in passes, what


def test_the_fingerprint_holds_what_the_figures_depend_on(tiny, prose, tmp_path):
    from dataclasses import replace

    import torch

    from foveate.compare.environment import environment
    from foveate.compare.options import Options
    from foveate.compare.validate import validate

    options = Options(model=str(tiny), text=str(prose), lengths="256", out=str(tmp_path))
    job = validate(options)
    where = environment(job.device) | {"threads": 2}

    def keys(job, where=where):
        plan = Plan(job.entries, job.lengths, job.passes, fingerprint(job, where))
        return {plan.key(cell) for cell in plan.cells()}

    mine = keys(job)
    assert mine == keys(validate(options))
    others = [
        keys(job, where | {"threads": 1}),
        keys(job, where | {"torch": "9.9"}),
        keys(job, where | {"code": "changed"}),
        keys(job, where | {"processor": "another"}),
        keys(replace(job, dtype=torch.bfloat16)),
        keys(replace(job, info=replace(job.info, fingerprint="x"))),
        keys(replace(job, text=replace(job.text, sha256="x"))),
        keys(replace(job, options=replace(options, batch=2))),
        keys(replace(job, options=replace(options, decode_tokens=9))),
        keys(replace(job, depths=(0.5,))),
        keys(validate(replace(options, repeats=4))),
    ]
    for other in others:
        assert not other & mine
    # limits, folders and the report's looks change no measurement
    assert keys(validate(replace(options, max_ppl_loss=0.5, out=str(tmp_path / "x")))) == mine
