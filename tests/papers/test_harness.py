"""Running miniatures: verdicts, resuming, tuning, and what lands on the disk."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toys import GRID, paper

from foveate.ops.errors import InputError
from foveate.papers.harness import Grid, Trial, Verdict, at_least, at_most, either, stopwatch
from foveate.papers.harness.run import Run
from foveate.papers.harness.table import ends_of, judged_again, section
from foveate.papers.harness.verdict import FIELDS, figures_of
from foveate.papers.training import DivergedError


def run(made, folder, **more):
    with Run(made, folder, **more) as ready:
        return ready()


def test_the_verdict_has_the_fields_of_the_design(tmp_path):
    result = run(paper(), tmp_path)
    verdict = result.verdict
    assert list(verdict) == [
        "key", "claim", "metric", "baseline", "ours", "holds_if", "verdict", "seeds", "seconds",
        "environment",
    ] == list(FIELDS)  # fmt: skip
    assert verdict["verdict"] == "holds"
    assert verdict["seeds"] == [0, 1, 2]
    assert verdict["baseline"]["dense"]["loss"]["values"] == [1.5, 1.7, 1.9]
    assert verdict["baseline"]["dense"]["loss"]["mean"] == pytest.approx(1.7)
    assert verdict["baseline"]["dense"]["loss"]["sd"] == pytest.approx(0.2)
    assert "curve" not in verdict["ours"]["ours"]
    assert verdict["holds_if"] == (
        "loss(ours) - loss(dense) <= 0.03; cache(dense) / cache(ours) >= 8"
    )
    assert verdict["environment"]["torch"] == torch.__version__
    assert verdict["environment"]["data"] == "generated"
    assert json.loads(result.files["verdict"].read_text()) == verdict
    assert figures_of(verdict)[1]["ours"]["cache"] == 32.0


def test_what_no_arm_is_named_for_is_kept_and_judged_again(tmp_path):
    """A kept verdict has all that its checks read."""
    made, cells = paper(), paper().run
    control = at_most("loss(control)", lambda at: at["control"]["loss"], 9.0)

    def run_both(trial):
        found = cells(trial)
        return found | {"control": {"loss": 5.0 + trial.seed}} if "ours" in found else found

    made = dataclasses.replace(made, run=run_both, checks=(*made.checks, control))
    verdict = run(made, tmp_path).verdict
    assert verdict["ours"]["control"]["loss"]["values"] == [5.0, 6.0, 7.0]
    assert [str(one.verdict) for one in judged_again(made, verdict)] == ["holds"] * 3


@pytest.mark.parametrize(
    ("gap", "noise", "expected"),
    [(0.01, 0.001, "holds"), (0.06, 0.001, "refuted"), (0.03, 0.01, "inconclusive")],
)
def test_each_verdict_can_come_out(tmp_path, gap, noise, expected):
    assert run(paper(gap, noise), tmp_path).verdict["verdict"] == expected


def test_one_of_two_tasks_is_enough_but_not_the_better_of_two_noisy_ones():
    check = either(
        "gains",
        at_least("a", lambda at: at["x"]["a"], 0.02),
        at_least("b", lambda at: at["x"]["b"], 1.0),
    )
    assert check.text.startswith("gains: a >= 0.02 or b >= 1 (")

    def seeds(a, b):
        return [{"x": {"a": one, "b": other}} for one, other in zip(a, b)]

    assert check.verdict(seeds([0.03] * 3, [-5.0] * 3)) is Verdict.HOLDS
    assert check.verdict(seeds([0.0] * 3, [2.0, 2.1, 2.2])) is Verdict.HOLDS
    assert check.verdict(seeds([0.0, 0.01, 0.0], [-5.0] * 3)) is Verdict.REFUTED
    assert check.verdict(seeds([0.0] * 3, [-5.0, 0.0, 6.0])) is Verdict.INCONCLUSIVE
    # Seed by seed the better one is always good; neither is, over the seeds.
    noisy = seeds([0.05, -0.05, 0.05], [-3.0, 3.0, -3.0])
    assert check.verdict(noisy) is Verdict.INCONCLUSIVE
    assert check.values(noisy) == pytest.approx([2.5, -2.5, 2.5])
    # What is shown is the one that decides, though the other has the better mean.
    undecided = seeds([0.0, 0.001, 0.0], [-9.0, 0.0, 6.0])
    assert check.verdict(undecided) is Verdict.INCONCLUSIVE
    assert check.values(undecided) == [-9.0, 0.0, 6.0]
    held = seeds([0.03] * 3, [-1.0, 0.0, 99.0])
    assert check.verdict(held) is Verdict.HOLDS
    assert check.values(held) == pytest.approx([1.5] * 3)
    for wrong in (at_most("c", len, 1.0), at_least("c", len, 0.0), at_least("c", len, -1.0)):
        with pytest.raises(ValueError, match="at least a number above 0"):
            either("gains", wrong, wrong)
    with pytest.raises(ValueError, match="two conditions or more"):
        either("gains", at_least("a", len, 1.0))
    with pytest.raises(TypeError, match="all seeds"):
        check.figure(noisy[0])


def test_an_unmet_need_makes_it_inconclusive(tmp_path):
    learnt = at_most("loss(dense)", lambda at: at["dense"]["loss"], 0.5)
    made = paper(gap=0.9, needs=(learnt,))
    result = run(made, tmp_path)
    assert [str(one.verdict) for one in result.outcomes] == ["refuted", "holds", "refuted"]
    assert result.verdict["verdict"] == "inconclusive"
    assert "says nothing unless loss(dense) <= 0.5" in result.verdict["holds_if"]


def test_a_quick_run_decides_only_what_is_counted(tmp_path):
    calls = []
    result = run(paper(calls=calls), tmp_path, quick=True)
    assert [call[1:] for call in calls] == [(0, None, True)] * 2
    assert [str(one.verdict) for one in result.outcomes] == ["inconclusive", "holds"]
    assert result.verdict["verdict"] == "inconclusive"
    assert result.verdict["environment"]["quick"] is True
    assert result.files["verdict"].name == "verdict.quick.json"
    counted = at_least("cache", lambda at: at["dense"]["cache"], 256, exact=True)
    result = run(paper(checks=(counted,)), tmp_path / "other", quick=True)
    assert result.verdict["verdict"] == "holds"


@pytest.mark.parametrize("stop", range(6))
def test_stopped_at_any_cell_it_goes_on_and_runs_nothing_twice(tmp_path, stop):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        run(paper(calls=calls, fail_at=stop), tmp_path)
    result = run(paper(calls=calls), tmp_path)
    order = [(cell, seed) for seed in (0, 1, 2) for cell in ("dense", "ours")]
    assert [call[:2] for call in calls] == order
    assert (result.ran, result.found) == (6 - stop, stop)
    whole = run(paper(), tmp_path / "other")
    for name in ("baseline", "ours", "verdict"):
        assert result.verdict[name] == whole.verdict[name]


def test_what_was_found_with_other_data_or_sizes_is_not_taken(tmp_path):
    run(paper(), tmp_path)
    assert run(paper(), tmp_path).ran == 0
    assert run(paper(data=lambda: "other text"), tmp_path).ran == 6
    assert run(paper(), tmp_path, quick=True).ran == 2
    assert run(paper(seeds=(0, 1, 2, 3)), tmp_path).ran == 2
    assert run(paper(), tmp_path, fresh=True).ran == 6


def test_a_damaged_file_is_kept_aside_and_the_good_seeds_stay(tmp_path):
    run(paper(), tmp_path)
    path = tmp_path / "toy" / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"rubbish\n", *lines[2:]]))
    with pytest.raises(InputError, match="kept as results.corrupt-1.jsonl; its 5 good records"):
        Run(paper(), tmp_path)
    assert run(paper(), tmp_path).ran == 1


def test_a_record_that_was_cut_off_is_run_again(tmp_path):
    run(paper(), tmp_path)
    path = tmp_path / "toy" / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    result = run(paper(), tmp_path)
    assert (result.ran, result.found) == (1, 5)
    assert (tmp_path / "toy" / "results.unfinished-1.jsonl").exists()


def test_a_folder_in_use_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    with Run(paper(), tmp_path), pytest.raises(InputError, match="is writing into"):
        Run(paper(), tmp_path)


def test_every_arm_is_tuned_alike_on_a_seed_that_is_not_judged(tmp_path):
    calls = []
    result = run(paper(calls=calls, grid=GRID), tmp_path)
    trials, judged = calls[:6], calls[6:]
    assert [call[:3] for call in trials] == [
        (cell, 1000, point) for cell in ("dense", "ours") for point in (1, 3, 4)
    ]
    assert all(tuned == 3 for _, _, tuned, _ in judged)
    assert len(judged) == 6
    assert result.verdict["environment"]["tuned"] == {"rate": {"dense": 3, "ours": 3}}
    assert run(paper(grid=GRID), tmp_path).ran == 0


def test_a_cell_that_is_no_training_is_not_tuned_and_adds_to_the_arms(tmp_path):
    plain = paper().run

    def with_counts(trial):
        if trial.cell == "counts":
            assert trial.tuned is None
            return {"dense": {"cache": 256.0}, "ours": {"cache": 16.0}}
        return plain(trial)

    grid = Grid("rate", (1, 3), cells=("dense", "ours"))
    made = paper(run=with_counts, grid=grid, cells=("dense", "ours", "counts"))
    verdict = run(made, tmp_path).verdict
    assert verdict["environment"]["tuned"]["rate"] == {"dense": 3, "ours": 3}
    assert verdict["ours"]["ours"]["cache"]["values"] == [16.0] * 3
    assert verdict["ours"]["ours"]["loss"]["values"][0] > 0


@pytest.mark.parametrize(("share", "steps"), [(1.0, 234), (0.4, 93), (1e-4, 1)])
def test_trials_take_their_share_of_the_steps_and_judged_cells_all(tmp_path, share, steps):
    plain, seen = paper().run, set()

    def noted(trial):
        seen.add((trial.tuning, trial.quick, trial.steps(234), trial.steps(234, 7)))
        return plain(trial)

    found = run(paper(run=noted, grid=Grid("rate", (1, 3), share=share)), tmp_path)
    assert seen == {(True, False, steps, steps), (False, False, 234, 234)}
    told = {} if share == 1 else {"trials": {"dense": share, "ours": share}}
    assert {k: v for k, v in found.verdict["environment"].items() if k == "trials"} == told
    assert Trial("dense", 0, quick=True, share=share).steps(500, 7) == 7
    assert Trial("dense", 0, share=0.4).steps(1000) == 400


def test_another_share_is_another_trial_and_some_cells_may_take_whole_runs(tmp_path):
    plain, seen = paper().run, []

    def noted(trial):
        seen.append((trial.cell, trial.share))
        return plain(trial)

    for share in (0.5, 0.25):
        grid = Grid("rate", (3,), share=share, whole=("ours",))
        verdict = run(paper(run=noted, grid=grid), tmp_path).verdict
        assert verdict["environment"]["trials"] == {"dense": share, "ours": 1.0}
        assert seen[0] == ("dense", share)  # tried anew
        assert seen.count(("ours", 1.0)) == (4 if share == 0.5 else 0)  # its trial, three seeds
        seen.clear()
    for wrong in (0, 1.1):
        with pytest.raises(ValueError, match="share"):
            Grid("rate", (3,), share=wrong)


def test_the_page_says_whose_best_point_lies_at_an_end_of_what_was_tried(tmp_path):
    plain = paper().run

    def uneven(trial):  # ours is best at 4
        found = plain(trial)
        if trial.cell == "ours":
            found["ours"]["validation"] = 9.0 - (trial.tuned or 0)
        return found

    def page(points, later=None, **more):
        made = paper(grid=Grid("rate", points), **more)
        verdict = run(made, tmp_path / f"{points} {len(more)}").verdict
        assert verdict["environment"]["tried"] == {"rate": list(points)}
        return section(made if later is None else paper(grid=Grid("rate", later)), verdict)

    assert "At an end" not in page((1, 3, 4))  # 3 is best
    assert "At an end of what was tried (3 to 4): all." in page((3, 4))
    assert "At an end of what was tried (1 to 4): ours." in page((1, 3, 4), run=uneven)
    assert "At an end of what was tried (1 to 3): all." in page((1, 3), later=(1, 3, 4))
    old = run(paper(grid=Grid("rate", (1, 3))), tmp_path / "old").verdict
    del old["environment"]["tried"]  # as before they were kept
    assert "At an end of what was tried (1 to 3): all." in section(
        paper(grid=Grid("rate", (1, 3))), old
    )
    assert "At an end" not in section(paper(grid=Grid("rate", (4, 5))), old)
    assert ends_of((4, 1, 3)) == (1, 4)
    assert ends_of((3,)) == ends_of(([1, 2], [3, 4])) == ()


def test_a_point_that_diverges_is_not_taken(tmp_path):
    plain = paper().run

    def wild(trial):
        if trial.tuned in (3, 4):
            raise DivergedError("too much")
        return plain(trial)

    result = run(paper(run=wild, grid=GRID), tmp_path)
    assert result.verdict["environment"]["tuned"]["rate"] == {"dense": 1, "ours": 1}

    def hopeless(trial):
        raise DivergedError("too much")

    with pytest.raises(DivergedError, match="dense diverged at every rate"):
        run(paper(run=hopeless, grid=GRID), tmp_path / "other")


def test_each_cell_starts_from_its_seed_and_leaves_torch_alone(tmp_path):
    def random(trial):
        return {trial.cell: {"loss": torch.rand(()).item(), "cache": 1.0}}

    state = torch.random.get_rng_state()
    one = run(paper(run=random), tmp_path / "one").verdict
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    other = run(paper(run=random), tmp_path / "other").verdict
    assert one["ours"] == other["ours"]
    assert one["ours"]["ours"]["loss"] == one["baseline"]["dense"]["loss"]


def test_checkpoints_of_a_finished_cell_are_removed(tmp_path):
    seen: list[Path] = []
    plain = paper().run

    def keeping(trial):
        trial.folder.mkdir(parents=True)
        seen.append(trial.folder)
        return plain(trial)

    run(paper(run=keeping), tmp_path)
    assert len(set(seen)) == 6
    assert not any(path.exists() for path in seen)


def test_a_cell_that_is_stopped_finds_its_checkpoints_unless_all_begins_anew(tmp_path):
    seen = []
    plain = paper().run

    def stopped(trial):
        seen.append((trial.folder / "kept").exists())
        trial.folder.mkdir(parents=True, exist_ok=True)
        (trial.folder / "kept").touch()
        raise KeyboardInterrupt

    for fresh in (False, False, True, False):
        with pytest.raises(KeyboardInterrupt):
            run(paper(run=stopped), tmp_path, fresh=fresh)
    assert seen == [False, True, False, True]
    assert run(paper(run=plain), tmp_path).ran == 6


def test_an_arm_that_no_cell_returns_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no cell returned the arms missing"):
        run(paper(ours=("ours", "missing")), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cells": ("dense", "dense")}, "cells must be distinct"),
        ({"checks": ()}, "there must be checks"),
        ({"ours": ("dense",)}, "both baseline and ours"),
        ({"seeds": (0, 1000), "grid": GRID}, "tuned on a seed that is judged"),
    ],
)
def test_a_miniature_that_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        paper(**wrong)


def test_figures_that_are_no_number_are_refused(tmp_path):
    def nan(trial):
        return {trial.cell: {"loss": math.nan, "cache": 1.0}}

    with pytest.raises(InputError, match="loss of dense is nan"):
        run(paper(run=nan), tmp_path)


class Clock:
    """Stands for the clock on the wall; moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(stopwatch, "perf_counter", lambda: self.now)


def test_seconds_of_a_killed_run_count(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    path = tmp_path / "cell" / "seconds"
    watch = stopwatch.Stopwatch(path)
    clock.now += 0.5
    watch.tick()
    assert not path.exists()
    clock.now += 6.5
    watch.tick()
    clock.now += 0.25  # lost: the run is killed here
    later = stopwatch.Stopwatch(path)
    clock.now += 3.0
    assert later.seconds == 10.0
    for rubbish in ("", "nan", "-5", "\x00"):
        path.write_text(rubbish)
        assert stopwatch.Stopwatch(path).seconds == 0.0


def test_a_cell_that_is_stopped_and_gone_on_with_has_all_its_seconds(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    plain = paper().run

    def stopped(trial):
        clock.now += 40.0
        raise KeyboardInterrupt

    def whole(trial):
        clock.now += 2.0
        return plain(trial)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(paper(run=stopped), tmp_path)
    # The miniature's source is this module's either way, so its first cell goes on.
    assert run(paper(run=whole), tmp_path).verdict["seconds"] == 80.0 + 6 * 2.0
    assert run(paper(run=whole), tmp_path).verdict["seconds"] == 80.0 + 6 * 2.0
    assert run(paper(run=whole), tmp_path, fresh=True).verdict["seconds"] == 6 * 2.0


SCRIPT = """
import sys, time
from pathlib import Path
from toys import paper
from foveate.papers.harness.run import Run

out, how = sys.argv[1:]
plain = paper().run

def run(trial):
    with open(out + "/cells", "a") as file:
        file.write(f"{trial.cell} {trial.seed}\\n")
    while how == "slow" and (trial.cell, trial.seed) == ("ours", 1):
        time.sleep(0.02)
        trial.tell(0.5, "half way")
    return plain(trial)

with Run(paper(run=run), Path(out)) as ready:
    print(ready().verdict["verdict"])
"""


def test_a_process_that_is_killed_goes_on_at_its_cell(tmp_path):
    script = tmp_path / "miniature.py"
    script.write_text(SCRIPT)
    here, source = Path(__file__).parent, Path(stopwatch.__file__).parents[3]
    call = {"env": {"PYTHONPATH": f"{here}:{source}", "PATH": ""}, "text": True}
    command = [sys.executable, str(script), str(tmp_path)]
    process = subprocess.Popen([*command, "slow"], **call)
    last = time.monotonic() + 90
    while time.monotonic() < last and not list(tmp_path.glob("toy/checkpoints/*/seconds")):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -9
    done = subprocess.run([*command, "fast"], capture_output=True, **call)
    assert (done.returncode, done.stdout) == (0, "holds\n"), done.stderr
    assert (tmp_path / "cells").read_text().splitlines() == [
        "dense 0", "ours 0", "dense 1", "ours 1", "ours 1", "dense 2", "ours 2",
    ]  # fmt: skip
    verdict = json.loads((tmp_path / "toy" / "verdict.json").read_text())
    assert verdict["seconds"] >= 1.0  # the killed run waited so long in its cell


def test_checks_of_different_units_are_drawn_on_scales_of_their_own(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from foveate.papers.harness import figure

    def loss(at):
        return at["ours"]["loss"] - at["dense"]["loss"]

    checks = (
        at_most("loss", loss, 0.03, refuted=0.05),
        at_most("a thousand times as large", lambda at: 1000 * loss(at), 5.0),
        at_least("as it should be", lambda at: 500 + loss(at), 1.0),
        at_least("counted", lambda at: at["dense"]["cache"], 8, exact=True),
    )
    result = run(paper(checks=checks), tmp_path)
    made, axis = pyplot.subplots()
    figure._checks(axis, result)
    rows = {row: [] for row in range(3)}
    for points in axis.collections:
        for x, y in points.get_offsets():
            rows[round(y)].append(x)
    ends = [line.get_xydata() for line in axis.lines if len(set(line.get_ydata())) == 1]
    for (low, row), (high, _) in ends:
        rows[round(row)] += [low, high]
    assert len(ends) == 3
    assert all(max(map(abs, found)) == pytest.approx(1.0, rel=0.2) for found in rows.values())
    assert max(rows[0]) < 0 < min(rows[1])
    assert max(rows[2]) < 0
    dotted = [line for line in axis.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] > 0 for line in dotted] == [True]
    assert "0.01 (0.00831 to 0.0117)" in [text.get_text() for text in axis.texts]
    pyplot.close(made)


@pytest.mark.parametrize("exact", [False, True])
def test_a_figure_of_any_miniature_can_be_drawn(tmp_path, exact):
    pytest.importorskip("matplotlib")
    from foveate.papers.harness.figure import draw

    checks = (at_least("cache", lambda at: at["dense"]["cache"], 8, exact=exact),)
    path = draw(run(paper(checks=checks), tmp_path), tmp_path / "below" / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")
