"""Who hears how a run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foveate.compare.summary import Row


class Listener:
    """Hears how a run goes on; this one says nothing."""

    def say(self, text: str) -> None:
        """A step begins, or something is worth knowing."""

    def begin(self, total: float, done: float) -> None:
        """Measuring begins: all work, and what was measured before, in the same unit."""

    def advance(self, work: float, doing: str) -> None:
        """Some work is done, and what comes next."""

    def row(self, row: Row) -> None:
        """A method is through at a length."""
