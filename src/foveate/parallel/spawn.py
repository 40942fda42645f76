"""Start N processes of one group on this machine; results and errors come back by rank name.

    def work(place: Place, scale: float) -> float:            # at the top level of a module
        return float(dist_sum(torch.tensor(place.rank * scale)))

    run(work, ["attention-0", "ffn-0"], (0.5,), timeout=60)   # {"attention-0": 0.5, "ffn-0": 0.5}

The processes find each other through a store that this process holds on a free port, so no port is
guessed, and a rank that dies takes no store with it. They come from a fork server that has
imported torch and transformers once, where the platform has one: the first start takes seconds,
later ones a fraction. No rank outlives this process, or its `timeout`.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch
from torch import distributed

from foveate.ops.errors import FoveateError, InputError

HOST = "127.0.0.1"
_OFTEN = ("transformers.modeling_utils", "transformers.generation.utils")  # what models import


class RanksError(FoveateError, RuntimeError):
    """Ranks failed, died, or ran out of time.

    Attributes:
        errors: by rank name what went wrong; the first to fail stands first.
        results: by rank name what the others returned.
    """

    def __init__(self, errors: Mapping[str, str], results: Mapping[str, Any]) -> None:
        super().__init__(
            f"{len(errors)} of {len(errors) + len(results)} ranks failed, {next(iter(errors))!r} "
            "first:\n" + "\n".join(f"[{name}] {text}" for name, text in errors.items())
        )
        self.errors, self.results = dict(errors), dict(results)


@dataclass(frozen=True)
class Place:
    """Who a process is: its name and rank, everybody's names, and the store they share.

    Attributes:
        rank: index of `name` in `names`, and rank in the default process group.
        store: shared by all ranks and the process that started them, which may wait on it:
            `place.store.set("ready", "1")` here, `ranks.store.wait(["ready"])` there.
    """

    name: str
    rank: int
    names: tuple[str, ...]
    store: distributed.Store

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.names)


class Ranks:
    """Processes that run `target(place, *args)`, one for each name, in one process group.

    A context manager: on the way out whatever still runs is killed.

    Args:
        target: a function of a module (it is found there by its name in the new process).
        names: rank names, without repeats; the order is that of the ranks.
        args: handed to all ranks; pickled once.
        timeout: seconds from now until all ranks must have ended.
        grace: seconds that the others get after the first failure, before they are killed.
        threads: torch's threads in each rank.
        backend: of the default process group, or None if `target` makes its own from
            `place.store`. With "nccl" rank i takes GPU i.

    Raises:
        InputError: names are missing or repeated, or a time isn't above 0.
    """

    def __init__(
        self,
        target: Callable[..., Any],
        names: Sequence[str],
        args: Sequence[Any] = (),
        *,
        timeout: float = 120.0,
        grace: float = 5.0,
        threads: int = 1,
        backend: str | None = "gloo",
    ) -> None:
        if not names or len(set(names)) != len(names):
            raise InputError(f"Ranks(names={list(names)}): expected names without repeats.")
        if timeout <= 0 or grace <= 0:
            raise InputError(f"Ranks(timeout={timeout}, grace={grace}): expected seconds above 0.")
        self.names, self.timeout, self.grace = tuple(names), timeout, grace
        self.end = time.monotonic() + timeout
        self.store = distributed.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self.store.set_timeout(timedelta(seconds=timeout))
        context = _context()
        # Tensors by value, not as shared memory whose owner could be gone.
        job = pickle.dumps((target, tuple(args)))
        settings = (self.store.port, timeout, threads, backend, dict(os.environ))
        self.processes, self.results_of, self._alive = {}, {}, []
        for rank, name in enumerate(self.names):
            result, sender = context.Pipe(duplex=False)
            alive, holder = context.Pipe(duplex=False)
            process = context.Process(
                target=_child,
                args=(rank, self.names, settings, job, sender, alive),
                name=name,
                daemon=True,
            )
            process.start()
            sender.close()
            alive.close()
            self.processes[name], self.results_of[name] = process, result
            self._alive.append(holder)

    def kill(self, name: str) -> None:
        """`kill -9` for one rank: it gets no chance to say goodbye."""
        os.kill(self.processes[name].pid, signal.SIGKILL)

    def wait(self) -> dict[str, Any]:
        """What every rank returned, by name, in the order of the names.

        Raises:
            RanksError: a rank raised, died, or was still running at the end of the time.
        """
        results: dict[str, Any] = {}
        errors: dict[str, str] = {}
        end, late = self.end, f"still running after {self.timeout:g} s: killed."
        while waiting := [n for n in self.names if n not in results and n not in errors]:
            left = end - time.monotonic()
            handles = [self.results_of[n] for n in waiting]
            handles += [self.processes[n].sentinel for n in waiting]
            if left <= 0 or not wait(handles, left):
                errors |= dict.fromkeys(waiting, late)
                break
            for name in waiting:
                outcome = self._outcome(name)
                if outcome is None:
                    continue
                good, value = outcome
                if good:
                    results[name] = value
                    continue
                if not errors and time.monotonic() + self.grace < end:
                    end = time.monotonic() + self.grace
                    late = f"still running {self.grace:g} s after {name!r} had failed: killed."
                errors[name] = value
        self.close()
        results = {name: results[name] for name in self.names if name in results}
        if errors:
            raise RanksError(errors, results)
        return results

    def _outcome(self, name: str) -> tuple[bool, Any] | None:
        """(did it end well, its value or what went wrong), or None while it runs."""
        process, pipe = self.processes[name], self.results_of[name]
        ended = not process.is_alive()  # asked first: what it sent before is then in the pipe
        if pipe.poll():
            try:
                good, value = pickle.loads(pipe.recv_bytes())
                return bool(good), value
            except EOFError:
                process.join(1.0)
                ended = True
        if not ended:
            return None
        code = process.exitcode
        if code is not None and code < 0:
            return False, f"died: {signal.Signals(-code).name} (pid {process.pid})."
        return False, f"ended with exit code {code} and without a result (pid {process.pid})."

    def close(self) -> None:
        """Kill what still runs. Harmless when everything has ended."""
        for process in self.processes.values():
            process.join(0.5 if process.is_alive() and not self._has_more(process.name) else 0)
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in (*self.results_of.values(), *self._alive):
            pipe.close()

    def _has_more(self, name: str) -> bool:
        return not self.results_of[name].closed and self.results_of[name].poll()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()


def run(
    target: Callable[..., Any],
    names: Sequence[str],
    args: Sequence[Any] = (),
    *,
    timeout: float = 120.0,
    grace: float = 5.0,
    threads: int = 1,
    backend: str | None = "gloo",
) -> dict[str, Any]:
    """Start ranks as `Ranks` does, and wait for what they return, by name.

    Raises:
        InputError: as `Ranks`.
        RanksError: a rank raised, died, or was still running after `timeout` seconds.
    """
    with Ranks(
        target, names, args, timeout=timeout, grace=grace, threads=threads, backend=backend
    ) as ranks:
        return ranks.wait()


def _context() -> Any:  # the contexts' common base has no public type that knows Process
    """Fresh processes: a fork of this one would inherit its threads and their locks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Not foveate: the server doesn't know this process's sys.path, and may find another one.
    context.set_forkserver_preload(["torch", *_OFTEN])
    return context


def _child(
    rank: int,
    names: tuple[str, ...],
    settings: tuple[int, float, int, str | None, dict[str, str]],
    job: bytes,
    sender: Connection,
    alive: Connection,
) -> None:
    """Run the target in this new process; send (True, value) or (False, what was wrong)."""
    threading.Thread(target=_die_with, args=(alive,), daemon=True).start()
    try:
        port, timeout, threads, backend, environment = settings
        os.environ.update(environment)
        torch.set_num_threads(threads)
        limit = timedelta(seconds=timeout)
        store = distributed.TCPStore(HOST, port, is_master=False, timeout=limit)
        if backend is not None:
            if backend == "nccl":
                torch.cuda.set_device(rank)
            if sys.platform == "linux":  # a name that the machine can't resolve stops gloo
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            distributed.init_process_group(
                backend,
                store=distributed.PrefixStore("group", store),
                rank=rank,
                world_size=len(names),
                timeout=limit,
            )
        target, args = pickle.loads(job)
        value = target(Place(names[rank], rank, names, store), *args)
        sender.send_bytes(pickle.dumps((True, value)))
        sender.close()
        if distributed.is_initialized():
            distributed.destroy_process_group()
    except BaseException:  # whatever it was, the one who waits must hear of it
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
        sender.close()
        sys.stderr.flush()
        os._exit(1)  # without a goodbye to ranks that may never answer


def _die_with(alive: Connection) -> None:
    """End this process when the one that started it is gone."""
    try:
        alive.poll(None)
    finally:
        os._exit(1)
