"""What each stage took, as a Chrome trace; and stages of a set length, to test the pipeline.

A trace opens in chrome://tracing or ui.perfetto.dev: a process for each rank, a row for each
micro-batch (stages) and for each peer (transfers, from the sender's clock to the receiver's: they
mean something on one machine, where both are the same).
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_EVENTS = 200_000


class Trace:
    """Events of one rank.

    Args:
        name: the rank's.
        on: whether anything is kept.
    """

    def __init__(self, name: str, on: bool = True) -> None:
        self.name, self.on = name, on
        self.events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)  # the last ones
        self._offset = time.time_ns() - time.monotonic_ns()

    @contextmanager
    def span(self, what: str, micro_batch: int, **args: Any) -> Iterator[None]:
        """Time a stage: "attention", "ffn", "head" or "wait"."""
        begun = time.monotonic_ns()
        try:
            yield
        finally:
            self.add(what, f"micro-batch {micro_batch}", begun, time.monotonic_ns(), **args)

    def add(self, what: str, row: str, begun: int, ended: int, **args: Any) -> None:
        """Keep an event between two times of the monotonic clock, in nanoseconds."""
        if self.on:
            self.events.append(
                {"name": what, "ph": "X", "tid": row, "args": args}
                | {"ts": (begun + self._offset) / 1e3, "dur": (ended - begun) / 1e3}
            )

    def seconds(self, what: str) -> list[float]:
        """How long each stage of this name took."""
        return [event["dur"] / 1e6 for event in self.events if event["name"] == what]


def chrome_trace(events: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """One trace from the events of all ranks, by rank name, in Chrome's JSON form."""
    made: list[dict[str, Any]] = []
    start = min((e["ts"] for found in events.values() for e in found), default=0.0)
    for pid, (rank, found) in enumerate(events.items()):
        made.append({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": rank}})
        rows = sorted({str(e["tid"]) for e in found})
        for tid, row in enumerate(rows):
            named = {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid}
            made.append(named | {"args": {"name": row}})
        for e in found:
            made.append({**e, "pid": pid, "tid": rows.index(str(e["tid"])), "ts": e["ts"] - start})
    return {"traceEvents": made, "displayTimeUnit": "ms"}


def write_trace(path: Path, events: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write `chrome_trace` to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(chrome_trace(events)))


@dataclass(frozen=True)
class Pace:
    """Least seconds of each stage, for one micro-batch and layer; on one machine only.

    With stages of a known length the pipeline itself can be measured: t_A, t_F, c_AF and c_FA of

        TPOT = layers * max(b t_A, b t_F, b c_AF, b c_FA, t_A + t_F + c_AF + c_FA)

    A stage that is done early sleeps; a message is held back at its receiver, and each link carries
    one message at a time.
    """

    attention: float = 0.0
    ffn: float = 0.0
    forth: float = 0.0
    back: float = 0.0


class PacedLink:
    """When messages of a link of set speed arrive: one after the other, `seconds` each."""

    def __init__(self, seconds: float) -> None:
        self.length, self.free = round(seconds * 1e9), 0

    def arrival(self) -> int:
        """Of a message that is sent now; 0 if the link isn't paced."""
        if not self.length:
            return 0
        self.free = max(self.free, time.monotonic_ns()) + self.length
        return self.free


def sleep_until(moment: int) -> None:
    """Sleep until a time of the monotonic clock in nanoseconds; not at all if it is past."""
    left = moment - time.monotonic_ns()
    if left > 0:
        time.sleep(left / 1e9)


@contextmanager
def at_least(seconds: float) -> Iterator[None]:
    """Let what is inside take no less than so many seconds."""
    begun = time.monotonic_ns()
    yield
    sleep_until(begun + round(seconds * 1e9))
