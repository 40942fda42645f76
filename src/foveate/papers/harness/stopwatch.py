"""How long a cell took, over all the runs that worked on it."""

from __future__ import annotations

import math
from pathlib import Path
from time import perf_counter

EVERY = 1.0  # seconds between two writes


class Stopwatch:
    """Counts seconds from now on, on top of those that are kept in a file.

    A run that is killed has its seconds counted too, but for what passed since the last `tick`.

    Args:
        path: of the file; it and its folder are made with the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before = _kept(path)
        self._started = self._written = perf_counter()

    @property
    def seconds(self) -> float:
        """All seconds so far."""
        return self._before + perf_counter() - self._started

    def tick(self) -> None:
        """Time goes on; write it down if that was last done a while ago."""
        if perf_counter() - self._written >= EVERY:
            self.keep()

    def keep(self) -> None:
        """Write the seconds down, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(repr(self.seconds), encoding="ascii")
        new.replace(self.path)
        self._written = perf_counter()


def _kept(path: Path) -> float:
    """The seconds in a file; 0 where it isn't there or holds no such thing."""
    try:
        seconds = float(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0
