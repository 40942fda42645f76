"""Cells of one miniature side by side, each in a process of its own."""

from __future__ import annotations

import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from foveate.ops.errors import FoveateError, InputError
from foveate.papers.harness.cell import Cell, run_cell
from foveate.papers.harness.paper import Paper


@dataclass(frozen=True)
class Job:
    """A cell that isn't stored yet.

    Attributes:
        cell: to run.
        tuned: the best point of the grid for it.
        key: under which it is stored.
        checkpoints: its folder.
    """

    cell: Cell
    tuned: Any
    key: str
    checkpoints: Path


def run_jobs(
    paper: Paper,
    jobs: list[Job],
    *,
    workers: int,
    threads: int,
    quick: bool,
    device: torch.device,
    tell: Callable[[float, str], None],
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Run jobs in `workers` processes; each job is handed out as soon as it's done.

    Args:
        paper: the miniature, which every process makes anew.
        jobs: to run, in this order.
        workers: processes.
        threads: of each.
        quick: small sizes.
        device: to run on.
        tell: takes how many jobs the running ones amount to (their shares, summed), and what one
            of them is doing.

    Raises:
        FoveateError: of a cell; first every cell that is running is waited for, and handed out.
        InputError: a process died.
    """
    context = get_context("spawn")
    make = paper.again or partial(_load, paper.key)
    todo = iter(jobs)
    shares: dict[Connection, float] = {}
    running: dict[Connection, tuple[Job, BaseProcess]] = {}
    idle: list[tuple[Connection, BaseProcess]] = []
    failed: BaseException | None = None
    interrupt = _Interrupt()
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(
                target=_serve, args=(theirs, make, threads, quick, str(device)), daemon=True
            )
            process.start()
            theirs.close()
            idle.append((ours, process))
        while True:
            while idle and failed is None and (job := next(todo, None)) is not None:
                connection, process = idle.pop()
                connection.send(job)
                running[connection], shares[connection] = (job, process), 0.0
            if not running:
                break
            ready = set(wait(list(running), 1.0))
            if interrupt.heard:
                raise KeyboardInterrupt
            for connection in [at for at in running if at in ready]:
                job, process = running[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionError):
                    process.join(10)
                    del running[connection], shares[connection]
                    failed = failed or _died(paper.key, job, process.exitcode)
                    continue
                if kind == "tell":
                    shares[connection] = value[0]
                    tell(sum(shares.values()), value[1])
                    continue
                del running[connection], shares[connection]
                idle.append((connection, process))
                if kind == "done":
                    yield job, value
                else:
                    failed = failed or value
        if failed is not None:
            raise failed
    finally:
        interrupt.undo()
        for connection, process in [*idle, *((at, two[1]) for at, two in running.items())]:
            process.terminate()
            process.join()
            connection.close()


class _Interrupt:
    """Remembers SIGINT: Python drops a KeyboardInterrupt that comes while a finaliser runs.

    Attributes:
        heard: whether one came.
    """

    def __init__(self) -> None:
        self.heard = False
        self.before = signal.getsignal(signal.SIGINT)
        self.ours = threading.current_thread() is threading.main_thread() and callable(self.before)
        if self.ours:
            signal.signal(signal.SIGINT, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        if callable(self.before):
            self.before(number, frame)

    def undo(self) -> None:
        """Put the handler back."""
        if self.ours:
            signal.signal(signal.SIGINT, self.before)


def _load(key: str) -> Paper:
    from foveate import papers

    return papers.load(key)


def _died(paper: str, job: Job, code: int | None) -> InputError:
    return InputError(
        f"{paper}: the process of the cell {job.cell.name!r} (seed {job.cell.seed}) died with "
        f"exit code {code}; -9 is mostly too little memory. What was finished is kept: start it "
        "again, with fewer workers."
    )


def _serve(
    connection: Connection, make: Callable[[], Paper], threads: int, quick: bool, device: str
) -> None:  # pragma: no cover - runs in a process of its own
    """Run what comes, until the other side goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    torch.set_num_threads(threads)
    paper = make()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            values = run_cell(
                paper, job.cell, job.tuned, job.checkpoints, quick=quick,
                device=torch.device(device),
                tell=lambda share, doing: connection.send(("tell", (share, doing))),
            )  # fmt: skip
        except Exception as error:
            connection.send(("failed", _portable(error, paper.key, job)))
        else:
            connection.send(("done", values))


def _portable(error: Exception, key: str, job: Job) -> Exception:
    """An error that another process can raise."""
    if not isinstance(error, FoveateError):
        return RuntimeError(
            f"{key}, {job.cell.name}, seed {job.cell.seed}: {type(error).__name__}: {error}"
        )
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return FoveateError(str(error))
    return error
