"""What a row of the catalog says of a method: words only, so that reading it imports nothing."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple


class Support(NamedTuple):
    """Whether something works, and what a user should know about it."""

    works: bool
    note: str = ""

    def __str__(self) -> str:
        word = "yes" if self.works else "no"
        return f"{word}: {self.note}" if self.note else word


YES = Support(True)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a method can do; everything that says no is refused with that reason.

    `causal_outputs` and `causal_routing` are two properties: that an output, with the choice of
    what it sees held fixed, doesn't see later tokens, and that the choice doesn't either.
    """

    prefill: Support = YES
    decode: Support = YES
    backward: Support = YES
    gqa: Support = YES
    padding: Support = YES
    bidirectional: Support = YES
    causal_outputs: Support = YES
    causal_routing: Support = YES


class Paper(NamedTuple):
    """A citation: title, first authors and year, arXiv id."""

    title: str
    authors: str
    arxiv: str

    @property
    def url(self) -> str:
        """Address of the abstract."""
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True, slots=True)
class Row:
    """One method.

    Attributes:
        key: the name that every command and `foveate.use` takes.
        kind: attention, pattern, projection, mixer, ... (the words of the design).
        path: the class, as `module.name`.
        title: what people call it.
        summary: one sentence on what it does.
        papers: where it is defined; empty only for what no paper defines.
        miniature: key of the miniature in `foveate.papers` that tests its claim; "" without one.
        capabilities: what works and what doesn't.
        jobs: where users reach it.
    """

    key: str
    kind: str
    path: str
    title: str
    summary: str
    papers: tuple[Paper, ...]
    miniature: str
    capabilities: Capabilities
    jobs: tuple[str, ...] = ("compare", "use")

    def load(self) -> Any:
        """Import and return the class."""
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data, for JSON."""
        plain = dataclasses.asdict(self)
        plain["papers"] = [{**p._asdict(), "url": p.url} for p in self.papers]
        plain["capabilities"] = {
            field.name: getattr(self.capabilities, field.name)._asdict()
            for field in dataclasses.fields(self.capabilities)
        }
        return plain


VASWANI = Paper("Attention Is All You Need", "Vaswani et al., 2017", "1706.03762")

BUILDERS = ("Attention", "train")
