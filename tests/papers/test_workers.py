"""Cells side by side in processes of their own: the same figures, the same records."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from toys import breaking, paper

from foveate import papers
from foveate.ops.errors import InputError
from foveate.papers.contest.job import Contest, paper_of
from foveate.papers.harness import workers as beside
from foveate.papers.harness.cell import Cell
from foveate.papers.harness.run import Run
from foveate.papers.harness.workers import Job, run_jobs

KEY = "rectified-spaattn"  # small, and every cell is seeded


def _run(out, workers, **more):
    with Run(papers.load(KEY), out, quick=True, workers=workers, **more) as run:
        return run()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_two_workers_find_what_one_finds_and_the_records_are_the_same(tmp_path, one_thread):
    alone = _run(tmp_path / "alone", 1)
    both = _run(tmp_path / "both", 2)
    assert both.ran == alone.ran == 2
    assert both.seeds == alone.seeds
    assert both.verdict["verdict"] == alone.verdict["verdict"]
    assert both.verdict["environment"] == alone.verdict["environment"] | {"workers": 2}
    torch.set_num_threads(2)  # with more threads it takes what the workers found
    again = _run(tmp_path / "both", 1)
    assert (again.ran, again.found) == (0, 2)


def test_only_timed_cells_are_run_anew_with_other_threads(tmp_path, monkeypatch):
    toy = paper(calls=[], alone=("dense",))
    with Run(toy, tmp_path) as run:
        run()
    calls = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with Run(paper(calls=calls, alone=("dense",)), tmp_path) as run:
        run()
    assert [name for name, *_ in calls] == ["dense"] * 3


def test_cells_that_take_times_stay_in_this_process(tmp_path, monkeypatch):
    asked = []

    def run_jobs(toy, jobs, *, workers, threads, **_):
        asked.extend((toy.key, workers, threads, job.cell.name) for job in jobs)
        for job in jobs:
            found = {"ours": {"loss": 1.5, "validation": 1.5, "cache": 32.0, "curve": [[0, 1.0]]}}
            yield job, {"found": found, "diverged": False, "seconds": 1.0}

    monkeypatch.setattr("foveate.papers.harness.run.run_jobs", run_jobs)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    calls = []
    toy = paper(calls=calls, alone=("dense",))
    with Run(toy, tmp_path, workers=2) as run:
        run()
    assert asked == [("toy", 2, 2, "ours")] * 3
    assert [name for name, *_ in calls] == ["dense"] * 3


def test_a_timed_cell_must_be_a_cell():
    with pytest.raises(ValueError, match="run alone"):
        paper(alone=("nothing",))


def test_a_contest_can_be_made_again_in_another_process():
    made = paper_of(Contest(methods=("combiner",), steps=7))
    assert made.again is not None
    other = pickle.loads(pickle.dumps(made.again))()
    assert (other.cells, other.holds_if, other.run) == (made.cells, made.holds_if, made.run)


def test_no_worker_is_refused(tmp_path):
    with pytest.raises(InputError, match="workers must be 1 or more, got 0"):
        Run(paper(), tmp_path, workers=0)


def _jobs(tmp_path, *names):
    return [Job(Cell(name, 0), None, name, tmp_path / name) for name in names]


@pytest.mark.slow
def test_an_error_in_one_process_names_the_cell_and_loses_no_other(tmp_path):
    found = run_jobs(
        breaking(), _jobs(tmp_path, "dense", "ours"), workers=2, threads=1, quick=True,
        device=torch.device("cpu"), tell=lambda share, doing: None,
    )  # fmt: skip
    job, values = next(found)
    assert (job.cell.name, values["diverged"]) == ("ours", False)
    with pytest.raises(InputError, match="dense is broken"):
        next(found)


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(tmp_path, monkeypatch):
    context = beside.get_context("spawn")
    started = []

    class Context:
        Pipe = staticmethod(context.Pipe)

        @staticmethod
        def Process(**given):
            started.append(context.Process(**given))
            return started[-1]

    monkeypatch.setattr(beside, "get_context", lambda _: Context)

    def kill(share, doing):
        os.kill(started[0].pid, signal.SIGKILL)

    found = run_jobs(
        papers.load(KEY), _jobs(tmp_path, "one field"), workers=1, threads=1, quick=True,
        device=torch.device("cpu"), tell=kill,
    )  # fmt: skip
    with pytest.raises(InputError, match="'one field' .*exit code -9"):
        list(found)
    assert not any(process.is_alive() for process in started)


@pytest.fixture
def interrupts():
    """Ctrl-C is heard, also where these tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interrupts")
def test_interrupted_it_ends_at_once_and_leaves_no_process_behind(tmp_path):
    command = [
        sys.executable, "-m", "foveate.cli", "reproduce", "rectified-spaattn", "--workers", "2",
        "--out", str(tmp_path), "--threads", "2",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        children: list[str] = []
        while len(children) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
            with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
                children = file.read().split()
        assert len(children) >= 2
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # don't wait for all of the miniature
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(process.stderr.read().decode()[-3000:]) from None
    assert process.returncode != 0
    deadline = time.monotonic() + 30  # one that was just starting finds its parent gone
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    records = tmp_path / "rectified-spaattn" / "results.jsonl"
    if records.exists():
        assert all(json.loads(line) for line in records.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_that_python_drops_is_heard_all_the_same(monkeypatch, tmp_path):
    """As one that comes while a finaliser runs."""
    began = signal.getsignal(signal.SIGINT)

    class Dropped(beside._Interrupt):
        def _hear(self, number, frame):
            self.heard = True

    monkeypatch.setattr(beside, "_Interrupt", Dropped)
    toy = papers.load(KEY)
    jobs = [Job(Cell(toy.cells[0], seed), None, "key", tmp_path) for seed in range(2)]
    done = run_jobs(
        toy, jobs, workers=1, threads=1, quick=True, device=torch.device("cpu"),
        tell=lambda share, doing: os.kill(os.getpid(), signal.SIGINT),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        list(done)
    assert signal.getsignal(signal.SIGINT) is began
