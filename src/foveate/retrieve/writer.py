"""The one who writes into an index folder.

    index.json      what readers read: settings and segments, with a sum; replaced in one step
    building.json   segments that are whole but not yet part of the index
    segments/       one folder each (`foveate.retrieve.segment`)
    model-.../      the retriever that made the vectors

A segment is finished, then noted in building.json, and only when all are there index.json names
them. Killed at any moment, readers find the index as it was before, or are told that it isn't
finished; the next writer goes on behind the segments that were noted.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from foveate.ops.errors import InputError
from foveate.retrieve import segment
from foveate.retrieve.collection import Passage
from foveate.retrieve.files import DamagedError, read_json, replace_json
from foveate.runs.records import locked

INDEX, BUILDING, SEGMENTS, FORMAT = "index.json", "building.json", "segments", 1


def read_index(folder: Path) -> dict[str, Any]:
    """What readers may see of an index.

    Raises:
        InputError: there is none, or it isn't finished.
        DamagedError: its list of segments was changed.
    """
    index = read_json(folder / INDEX)
    if index is None:
        begun = read_json(folder / BUILDING)
        if begun is not None:
            there = sum(entry["passages"] for entry in begun["segments"])
            raise InputError(
                f"The index in {folder} isn't finished: {there:,} of {begun['wanted']:,} passages "
                "are there. Run the same foveate index again; it goes on from there."
            )
        raise InputError(f"{folder} holds no index; make one: foveate index DOCS --out {folder}")
    if index.get("format") != FORMAT:
        raise InputError(f"{folder} was made by another version of foveate; index it anew.")
    return index


class Writer:
    """An index folder, locked from here until `close`.

    Args:
        folder: made if it isn't there.
        fresh: leave what is indexed to its readers until all is there anew.

    Raises:
        InputError: the folder can't be written, or another process writes there.
        DamagedError: a list of segments was changed.
    """

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.folder, self.segments = folder, folder / SEGMENTS
        self._lock = locked(folder)
        try:
            self._read(fresh)
        except BaseException:
            self.close()
            raise

    def _read(self, fresh: bool) -> None:
        old = None if fresh else read_json(self.folder / INDEX)
        begun = None if fresh else read_json(self.folder / BUILDING)
        for found in (old, begun):
            if found is not None and found.get("format") != FORMAT:
                raise InputError(
                    f"{self.folder} was made by another version of foveate; index with --fresh."
                )
        if old is not None and begun is not None:
            shown, noted = ({e["name"] for e in found["segments"]} for found in (old, begun))
            if noted and noted <= shown:  # stopped between showing the index and forgetting this
                begun = None
            elif begun["fresh"]:
                old = None
        self.fresh = fresh or (begun is not None and begun["fresh"])
        self.base: list[dict[str, Any]] = [] if old is None else old["segments"]
        self.pending: list[dict[str, Any]] = begun["segments"] if begun else []
        settings = (begun or old or {}).get("settings")
        self.settings: dict[str, Any] | None = settings
        self.wanted = begun["wanted"] if begun else 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others write."""
        self._lock.close()

    @property
    def entries(self) -> list[dict[str, Any]]:
        """All segments that will be part of the index."""
        return [*self.base, *self.pending]

    def plan(self, passages: Sequence[Passage]) -> list[Passage]:
        """The passages that no segment holds as they are now, in their order.

        Segments that a killed run noted are checked; a damaged one is made again.
        """
        kept = []
        for entry in self.pending:
            try:
                segment.check(self.segments, entry)
                kept.append(entry)
            except (OSError, InputError):
                continue
        self.pending = kept
        there = {pair for entry in self.entries for pair in segment.listed(self.segments, entry)}
        return [p for p in passages if (p.key, p.digest) not in there]

    def begin(self, settings: dict[str, Any], wanted: int) -> None:
        """Note what is being made, and remove what was left lying about."""
        self.settings = settings
        self.wanted = wanted
        self._note()
        self._tidy()

    def add(
        self, passages: Sequence[Passage], rows: Sequence[segment.Row], facts: dict[str, Any]
    ) -> None:
        """Write a segment and note it."""
        taken = self.segments.glob("[0-9]*-*") if self.segments.is_dir() else []
        last = max((int(path.name.split("-")[0]) for path in taken), default=0)
        name = f"{last + 1:06d}-{passages[0].digest}"
        entry = segment.write(self.segments, name, passages, rows) | {"facts": facts}
        self.pending.append(entry)
        self._note()

    def finish(self, passages: Sequence[Passage], *, prune: bool = False) -> dict[str, int]:
        """Let readers see it.

        Args:
            passages: as they are now; other versions of them are marked as deleted.
            prune: passages that aren't among these are, too.

        Returns:
            How many passages are alive, and how many were replaced or removed by this.
        """
        wanted = {p.key: p.digest for p in passages}
        seen: set[tuple[str, str]] = set()
        entries, alive, gone = [], 0, 0
        for entry in self.entries:
            before, deleted = set(entry["deleted"]), []
            for row, (key, digest) in enumerate(segment.listed(self.segments, entry)):
                if key in wanted:
                    dead = digest != wanted[key] or (key, digest) in seen
                else:
                    dead = prune or row in before
                seen.add((key, digest))
                if dead:
                    deleted.append(row)
                alive += not dead
                gone += dead and row not in before
            entries.append(entry | {"deleted": deleted})
        value = {"format": FORMAT, "settings": self.settings, "segments": entries}
        replace_json(self.folder / INDEX, value)
        (self.folder / BUILDING).unlink(missing_ok=True)
        self.base, self.pending = entries, []
        self._tidy()
        return {"passages": alive, "gone": gone}

    def _note(self) -> None:
        value = {
            "format": FORMAT, "settings": self.settings, "segments": self.pending,
            "fresh": self.fresh, "wanted": self.wanted,
        }  # fmt: skip
        replace_json(self.folder / BUILDING, value)

    def _tidy(self) -> None:
        """Remove segments and models that neither readers nor this writer know."""
        nothing: dict[str, Any] = {"segments": [], "settings": None}
        try:
            shown = read_json(self.folder / INDEX) or nothing
        except DamagedError:  # nobody can read it, and a fresh one is being made
            shown = nothing
        names = {entry["name"] for entry in (*shown["segments"], *self.entries)}
        models = {s["model"] for s in (shown["settings"], self.settings) if s is not None}
        found = list(self.segments.iterdir()) if self.segments.is_dir() else []
        for path in found:
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("model-*"):
            if path.name not in models:
                shutil.rmtree(path, ignore_errors=True)
