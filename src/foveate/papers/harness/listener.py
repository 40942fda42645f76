"""Who hears how a job goes on."""

from __future__ import annotations


class Listener:
    """Hears how a job goes on; this one says nothing."""

    def say(self, text: str) -> None:
        """Something is worth knowing."""

    def begin(self, title: str, parts: int) -> None:
        """A job of so many parts begins."""

    def skip(self, parts: float = 1) -> None:
        """Parts were found done: they took no time."""

    def advance(self, done: float, doing: str) -> None:
        """Parts that are done, the running one by its share, and what it is doing."""

    def end(self) -> None:
        """The job is through."""
