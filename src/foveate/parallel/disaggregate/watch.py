"""Who is to blame when a message doesn't come.

A rank that waits long, or in vain, says so in the shared store, with the names of those it waits
for. Who gives up looks there after a moment: those who wait for somebody themselves are innocent.
Who is left died (its connections closed) or stalled (nothing came within `patience`). The first
verdict counts for all ranks, so each of them reports the same name. A rank that fails by itself
says so first.

From death to the report pass about `SETTLE` seconds, from a stall `patience` and `SETTLE`.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

from foveate.ops.errors import FoveateError

SETTLE = 1.0
WAITING, STALLED, CLOSED = "waiting", "stalled", "closed"
Result = TypeVar("Result")


class RankLostError(FoveateError, RuntimeError):
    """A rank died, stalled or failed, and decoding ended.

    Attributes:
        rank: its name.
        reason: what was seen of it.
        finished: tokens of the requests that this rank had finished before, by id.
    """

    def __init__(
        self, rank: str, reason: str, finished: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        kept = "" if finished is None else f" {len(finished)} finished outputs of here are kept."
        super().__init__(f"{rank} {reason}.{kept}")
        self.rank, self.reason = rank, reason
        self.finished = {} if finished is None else {k: list(v) for k, v in finished.items()}


class Watch:
    """Waits for other ranks, and names the one that fails. A context manager.

    Args:
        store: shared by all ranks, and outliving each of them.
        name: this rank's.
        patience: seconds until a rank counts as stalled.
    """

    def __init__(self, store: distributed.Store, name: str, patience: float) -> None:
        self.store = distributed.PrefixStore("watch", store)
        self.name, self.patience = name, patience
        self._waiting: tuple[float, tuple[str, ...]] | None = None
        self._over = threading.Event()
        self._teller = threading.Thread(target=self._tell_of_long_waits, daemon=True)

    def __enter__(self) -> Watch:
        self._teller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._teller.join()

    def wait(self, work: distributed.Work | None, *peers: str) -> None:
        """Wait for a transfer with one peer, or a collective with several.

        Raises:
            RankLostError: it failed or took longer than `patience`.
        """
        if work is not None:
            self.call(lambda: work.wait(timedelta(seconds=self.patience)), *peers)

    def call(self, transfer: Callable[[], Result], *peers: str) -> Result:
        """Call something that starts a transfer with these peers, or waits for one.

        Raises:
            RankLostError: it failed or took longer than `patience`.
        """
        begun = time.monotonic()
        self._waiting = begun, peers
        try:
            return transfer()
        except RuntimeError as error:  # what gloo raises when a peer is gone, or the time is over
            late = time.monotonic() - begun >= self.patience
            raise self._verdict(peers, STALLED if late else CLOSED) from error
        finally:
            self._waiting = None

    def _tell_of_long_waits(self) -> None:
        """Say so before anybody's patience ends: others may have begun to wait a little earlier."""
        told, key = None, f"waits/{self.name}"
        with contextlib.suppress(RuntimeError):
            while not self._over.wait(self.patience / 8):
                now = self._waiting
                if told is not None and told is not now:
                    self.store.delete_key(key)
                    told = None
                if now is None or now is told:
                    continue
                if time.monotonic() - now[0] > self.patience / 2:
                    self.store.set(key, json.dumps([WAITING, list(now[1])]))
                    told = now

    def confess(self, error: BaseException) -> None:
        """Tell the others that this rank fails by itself."""
        text = str(error).splitlines()
        reason = f"failed: {type(error).__name__}: {text[0] if text else ''}"
        with contextlib.suppress(RuntimeError):  # the store is gone: nobody is left to be told
            self._first([self.name, reason])

    def _verdict(self, peers: Sequence[str], how: str) -> RankLostError:
        """Whom this rank's vain wait for `peers` leads to."""
        try:
            self.store.set(f"waits/{self.name}", json.dumps([how, list(peers)]))
            settled = time.monotonic() + SETTLE
            while (found := self._read("verdict")) is None and time.monotonic() < settled:
                time.sleep(SETTLE / 50)
            found = found or self._first(self._culprit(peers, how))
        except RuntimeError:  # without the store this rank knows only what it saw itself
            found = _sentence(peers, how, self.patience)
        return RankLostError(*found)

    def _culprit(self, peers: Sequence[str], how: str) -> list[str]:
        seen, blamed = {self.name}, dict[str, str]()
        front = [(peer, how) for peer in peers]
        while front:
            name, seen_as = front.pop(0)
            if name in seen:
                continue
            seen.add(name)
            waits = self._read(f"waits/{name}")
            if waits is None or (seen_as == CLOSED and waits[0] == WAITING):
                blamed[name] = seen_as  # it didn't give up before its connections closed
            else:
                how = CLOSED if waits[0] == CLOSED else STALLED
                front += [(peer, how) for peer in waits[1]]
        if not blamed:
            return _sentence(sorted(seen), STALLED, self.patience)
        closed = [name for name, seen_as in blamed.items() if seen_as == CLOSED]
        return _sentence(closed or list(blamed), CLOSED if closed else STALLED, self.patience)

    def _read(self, key: str) -> list[Any] | None:
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def _first(self, verdict: list[str]) -> list[str]:
        """The verdict that was given first, which may be this one."""
        return json.loads(self.store.compare_set("verdict", "", json.dumps(verdict)))


def _sentence(names: Sequence[str], how: str, patience: float) -> list[str]:
    """[who, what was seen of them]."""
    if how == CLOSED:
        return [" or ".join(names), "died: its connections closed"]
    return [" or ".join(names), f"stalled: nothing came from it for {patience:g} s"]
