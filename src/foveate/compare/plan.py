"""What is to be measured, in which order.

A cell is one pass of one method at one length: prompt number r, prefill and decoding in turn with
dense. Two methods share a dense pass that runs between them, so that each stands next to it; the
order turns round with r. Short lengths come first: useful rows come early.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from foveate import catalog
from foveate.methods import make, make_attention, spec
from foveate.ops.errors import InputError
from foveate.runs.records import digest

DEFAULT_METHODS = (
    "full, sink-window(sinks=4, window=1024), a-shape(sinks=128, local=512), "
    "vertical-slash(verticals=400, slashes=400), block-sparse(fraction=0.5)"
)
ENCODER_METHODS = (
    "full, sink-window(sinks=4, window=128), a-shape(sinks=64, local=64), "
    "block-sparse(fraction=0.5)"
)
DEFAULT_LENGTHS = (1024, 2048, 4096)
# For a budget sweep: the hyper-parameters that say how much is kept, and the factors on them.
BUDGETS = {
    "sink-window": ("window",),
    "a-shape": ("local",),
    "vertical-slash": ("verticals", "slashes"),
    "block-sparse": ("blocks",),
    "tri-shape": ("local",),
    "hyperattention": ("block_size", "sample_size"),
    "dhsa": ("budget",),
    "flux": ("local",),
    "mminference": ("budget",),
    "snapkv": ("budget",),
    "h2o": ("heavy", "recent"),
}
FACTORS = (0.25, 0.5, 1.0, 2.0)
# Last tokens of a text that are read one by one, for methods that drop keys from the cache.
FOLLOWED = 128


@dataclass(frozen=True)
class Entry:
    """A method of the run.

    Attributes:
        name: the text that makes it, as shown and as `foveate.use` takes it.
        key: its catalog key.
        parameters: all its hyper-parameters, also those at their defaults.
        reserved: what it always keeps, whatever is selected; a phrase.
    """

    name: str
    key: str
    parameters: dict[str, Any] = dataclasses.field(hash=False)
    reserved: str

    def method(self) -> Any:
        """A new instance."""
        return make(self.name)

    @property
    def evicts(self) -> bool:
        """Whether it drops keys from the cache, so that decoding is what it changes."""
        return bool(getattr(catalog.get(self.key).load(), "evicts", False))

    @property
    def fitted(self) -> bool:
        """Whether it runs what a fit has made."""
        return bool(getattr(self.method(), "needs_fit", False))


@dataclass(frozen=True)
class Cell:
    """One pass of one method at one length."""

    entry: Entry
    length: int
    number: int

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for the record."""
        return {
            "method": self.entry.name,
            "parameters": self.entry.parameters,
            "length": self.length,
            "pass": self.number,
        }


@dataclass(frozen=True)
class Round:
    """Passes that are run in turn: the method before dense, dense, and the one after it."""

    before: Cell | None
    after: Cell | None

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The methods' cells in the order in which they run."""
        return tuple(cell for cell in (self.before, self.after) if cell is not None)

    @property
    def length(self) -> int:
        """Tokens of each prompt."""
        return self.cells[0].length

    @property
    def number(self) -> int:
        """Number of the prompt."""
        return self.cells[0].number


@dataclass(frozen=True)
class Plan:
    """Methods, lengths, and how many passes of each.

    `fingerprint` is all else that the figures depend on: model, text, device, dtype, versions.
    """

    entries: tuple[Entry, ...]
    lengths: tuple[int, ...]
    passes: int
    fingerprint: dict[str, Any] = dataclasses.field(hash=False)

    def key(self, cell: Cell) -> str:
        """The key of a cell's record."""
        return digest({"run": self.fingerprint, "cell": cell.as_dict()})

    def cells(self) -> Iterator[Cell]:
        """All cells, by length, method, pass."""
        for length in self.lengths:
            for entry in self.entries:
                for number in range(self.passes):
                    yield Cell(entry, length, number)

    def rounds(self, done: set[Cell]) -> Iterator[Round]:
        """The rounds that are left when some cells are done."""
        for length in self.lengths:
            for first in range(0, len(self.entries), 2):
                pair = self.entries[first : first + 2]
                for number in range(self.passes):
                    cells = [Cell(entry, length, number) for entry in pair]
                    left = [cell if cell not in done else None for cell in cells]
                    if len(left) == 1:
                        left.append(None)
                    if number % 2:
                        left.reverse()
                    if any(left):
                        yield Round(*left)


def entries_of(methods: list[str], *, sweep: bool = False) -> tuple[Entry, ...]:
    """The methods that a list names, each once.

    Args:
        methods: texts such as "sink-window(window=1024)".
        sweep: each method at several budgets, from a quarter to twice what is given.

    Raises:
        UnknownMethodError: there is no such method; the nearest names are offered.
        InputError: a hyper-parameter that doesn't exist or doesn't fit.
    """
    found: dict[str, Entry] = {}
    for text in methods:
        for method in _budgets(make_attention(text)) if sweep else [make_attention(text)]:
            name = spec(method) if sweep or "(" not in text else _tidy(text)
            entry = _entry(name, method)
            found.setdefault(digest([entry.key, entry.parameters]), entry)
    return tuple(found.values())


def _tidy(text: str) -> str:
    """The text of a method, blanks as Python writes them."""
    text = re.sub(r"\s*([=()])\s*", r"\1", text.strip())
    return re.sub(r"\s*,\s*", ", ", text)


def _entry(name: str, method: Any) -> Entry:
    key = name.partition("(")[0]
    parameters = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}
    told = getattr(method, "digest", None)
    if isinstance(told, str) and told:  # of a file that says what it does
        parameters["digest"] = told
    return Entry(name, key, parameters, reserved(key, parameters, method))


def reserved(key: str, parameters: dict[str, Any], method: Any) -> str:
    """What a method keeps whatever it selects: sinks and the local part."""
    if getattr(type(method), "exact", False):
        return "everything"
    told = getattr(method, "reserved", None)
    if isinstance(told, str):
        return told
    if key == "block-sparse":
        return f"each query's own block of {parameters['tile']} tokens (no sinks)"
    parts = []
    for name, words in (
        ("sinks", "first {} tokens"),
        ("forced_verticals", "first {} tokens"),
        ("window", "last {} tokens"),
        ("local", "last {} tokens"),
        ("forced_slashes", "last {} tokens"),
    ):
        value = parameters.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            parts.append(words.format(f"{value:,}"))
    return ", ".join(parts) or "nothing"


def _budgets(method: Any) -> list[Any]:
    """A method at each factor of its budget; those below what it must keep are left out."""
    key = spec(method).partition("(")[0]
    share = getattr(method, "fraction", None)
    made = []
    for factor in FACTORS:
        values: dict[str, Any]
        if share is not None:
            values = {"fraction": min(1.0, share * factor)}
        else:
            values = {n: _times(getattr(method, n), factor) for n in BUDGETS.get(key, ())}
        try:
            made.append(dataclasses.replace(method, **values))
        except InputError:
            if factor >= 1:
                raise
    return made


def _times(budget: int | float, factor: float) -> int | float:
    """A budget in tokens stays a whole number."""
    return budget * factor if isinstance(budget, float) else max(1, round(budget * factor))
