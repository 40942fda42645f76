"""Progress of a long job on standard error: a bar with the time left; plain lines on a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from foveate.papers.harness.listener import Listener

WIDE = 172


def console(*, stderr: bool = False) -> Console:
    """A console that doesn't fold its lines on a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else WIDE)


class Screen(Listener):
    """Shows how a job goes on; use it as a context manager."""

    def __init__(self) -> None:
        self.console = console(stderr=True)
        self._progress: Progress | None = None
        self._title, self._parts, self._said = "", 0, 0
        self._done = self._skipped = self._start = 0.0

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(Text(text, style="dim"), soft_wrap=True)

    def begin(self, title: str, parts: int) -> None:
        """Show the bar."""
        self.end()
        self._title, self._parts, self._said = title, parts, 0
        self._done = self._skipped = 0.0
        self._start = perf_counter()
        if self.console.is_terminal:
            self._progress = Progress(
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.description}", markup=False),
                console=self.console,
                transient=True,
            )
            self._progress.start()
            self._progress.add_task(title, total=parts)

    def steps(self, title: str, count: int) -> Callable[[float, str], None]:
        """Show the bar for `count` steps; what moves it takes (share done, what is being done).

        The share that it is called with first was there before: a job that goes on.
        """
        self.begin(title, count)
        begun = False

        def tell(share: float, doing: str) -> None:
            nonlocal begun
            if not begun:
                self.skip(share * count)
            begun = True
            self.advance(share * count, doing)

        return tell

    def skip(self, parts: float = 1) -> None:
        """Parts that took no time."""
        self._skipped += parts

    def advance(self, done: float, doing: str) -> None:
        """Move the bar; on a pipe, a line for each part that is done."""
        self._done = done
        said = "  ".join(part for part in (self.left(), self._title, doing) if part)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=done, description=said)
        elif int(done) > self._said and done > self._skipped:
            self._said = int(done)
            self.say(f"{int(done)} of {self._parts}  {said}")

    def end(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def left(self) -> str:
        """The time left, by what this run has done so far; empty while that is nothing."""
        done = self._done - self._skipped
        if done <= 0 or self._done >= self._parts:
            return ""
        seconds = round((self._parts - self._done) * (perf_counter() - self._start) / done)
        return f"{seconds // 60}:{seconds % 60:02d} left"
