"""A page for each row of the catalog, and the page that lists them; nothing is kept by hand.

What a page says comes from the row, the docstrings of the method's module and class, the fields of
the class, and the paper's miniature with its kept verdict. The line of Python is one that has run.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from griffe import Docstring, DocstringSectionKind
from method_use import use

from foveate import catalog, papers
from foveate.catalog import Row
from foveate.papers.harness.table import section

KINDS = {
    "pattern": "Patterns",
    "attention": "Attentions",
    "mixer": "Mixers",
    "projection": "Projections",
    "pooler": "Poolers",
    "router": "Routers of experts",
    "retriever": "Retrievers",
    "module": "Modules and whole systems",
    "values": "On values",
    "study": "Studies of trained attention",
}
CAPABILITIES = {
    "prefill": "whole prompts",
    "decode": "decoding with a cache",
    "backward": "training (backward)",
    "gqa": "fewer key heads than query heads",
    "padding": "padded batches",
    "bidirectional": "encoders (queries see later keys)",
    "causal_outputs": "outputs don't see later tokens",
    "causal_routing": "choices don't see later tokens",
}


def page(row: Row, kept: dict[str, dict[str, Any]], caption: str | None) -> str:
    """The page of a row, as Markdown.

    Args:
        row: of the catalog.
        kept: verdicts by key.
        caption: of the picture `<key>.png` beside the page; None if there is none.
    """
    method = row.load()
    cited = ", ".join(f"[{p.arxiv}]({p.url})" for p in row.papers)
    parts = [
        f"---\ntitle: {row.title}\n---",
        f"# {prose(row.title)}",
        f"**{prose(row.summary)}**",
        f"`{row.key}` · {row.kind}" + (f" · arXiv {cited}" if cited else ""),
    ]
    if caption is not None:
        parts.append(f"![The pairs that {row.key} visits]({row.key}.png){{ .pattern }}")
        parts.append(caption)
    parts += ["## Definition", *_definition(method)]
    parts += ["## Use it", *use(row)]
    fields = hyper_parameters(method)
    if fields:
        parts += ["## Hyper-parameters", fields]
    parts += ["## What it can do", _capabilities(row)]
    parts += ["## What is claimed", *_claim(row, kept)]
    if row.papers:
        lines = (f"- [{paper.title}]({paper.url}). {paper.authors}." for paper in row.papers)
        parts += ["## Papers", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


# -- what it is ------------------------------------------------------------------------------------
def _definition(method: type) -> Iterator[str]:
    """The module's text, where it says more than a headline, and the class's."""
    module = inspect.getdoc(sys.modules[method.__module__]) or ""
    if "\n\n" in module:
        yield prose(module)
    for part in sections(method):
        if part.kind is DocstringSectionKind.text:  # the module's text stands above it here
            yield prose(part.value.replace("; see the module's text.", "."))
    yield f"`{method.__module__}.{method.__name__}`"


def sections(method: type) -> list[Any]:
    """The parts of a class's docstring."""
    return Docstring(inspect.getdoc(method) or "").parse("google", warnings=False)


def prose(text: str) -> str:
    """A docstring's text as Markdown: indented lines and backticks stay, the rest is no markup."""
    lines = []
    for line in text.strip().splitlines():
        if line.startswith("    "):
            lines.append(line)
            continue
        pieces = re.split(r"(`[^`]*`)", line)
        pieces[::2] = map(_plain, pieces[::2])
        lines.append("".join(pieces))
    return _spaced("\n".join(lines))


def _plain(text: str) -> str:
    """Text in which nothing is markup."""
    return re.sub(r"([\\*_\[\]#])", r"\\\1", text).replace("<", "&lt;")


def _spaced(text: str) -> str:
    """Blank lines around indented lines, which Markdown needs to see code in them."""
    text = re.sub(r"(?m)^(?! {4})(.*\S.*)\n(?= {4}\S)", r"\1\n\n", text)
    return re.sub(r"(?m)^( {4}.*)\n(?=\S)", r"\1\n\n", text)


def hyper_parameters(method: type) -> str:
    """A table of a class's fields, their defaults and what they mean; empty without fields.

    What a field means is told by the class, or by the one that it extends.
    """
    told = _attributes(method)
    lines = ["| name | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(method):
        if not field.init:
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        said = told.get(field.name, "")
        if not said:  # it may be told of beside another one
            word = re.compile(rf"\b{field.name}\b")
            near = next((name for name, text in told.items() if word.search(text)), None)
            said = "" if near is None else f"see `{near}`"
        said = cell(prose(" ".join(said.split())))
        lines.append(f"| `{field.name}` | `{cell(repr(default))}` | {said} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _attributes(owner: type) -> dict[str, str]:
    """What a class and those that it extends say of each attribute.

    What is told by another class of the module ("see `Form`") is looked up there.
    """
    told: dict[str, str] = {}
    for one in reversed(owner.__mro__):
        for part in sections(one) if one.__doc__ else ():
            if part.kind is DocstringSectionKind.attributes:
                for said in part.value:
                    both = f"{said.name} {said.annotation}"
                    names = both if said.name.endswith(",") else said.name
                    told |= {name.strip(): said.description for name in names.split(",")}
    for name, text in told.items():
        if seen := re.fullmatch(r"see `(\w+)`\.", text):
            other = getattr(sys.modules[owner.__module__], seen[1])
            told[name] = _attributes(other)[name]
    return told


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def _capabilities(row: Row) -> str:
    lines = ["| | | |", "| --- | --- | --- |"]
    for field in dataclasses.fields(row.capabilities):
        support = getattr(row.capabilities, field.name)
        name = CAPABILITIES.get(field.name, field.name.replace("_", " "))
        word = "yes" if support.works else "**no**"
        lines.append(f"| {name} | {word} | {cell(prose(support.note))} |")
    return "\n".join(lines)


# -- its claim -------------------------------------------------------------------------------------
def _claim(row: Row, kept: dict[str, dict[str, Any]]) -> Iterator[str]:
    if not row.miniature:
        yield "It is here to be measured against and composed with; no claim of its own is tested."
    elif row.miniature not in papers.available():
        yield "Its miniature isn't written yet, so nothing has been tested."
    else:
        if row.key != row.miniature:
            yield f"This is the claim of the paper `{row.miniature}`, among whose methods it is."
        verdict = kept.get(row.miniature)
        yield section(papers.load(row.miniature), verdict).strip()
        again = "" if verdict is None else f"Run it again: `foveate reproduce {row.miniature}`. "
        yield f"{again}[All claims](../claims.md)."


def verdict_of(row: Row, kept: dict[str, dict[str, Any]]) -> str:
    """One or a few words for the list of methods."""
    if not row.miniature:
        return ""
    if row.miniature not in papers.available():
        return "no miniature yet"
    verdict = kept.get(row.miniature)
    word = "not run yet" if verdict is None else str(verdict["verdict"])
    return word if row.key == row.miniature else f"{word} ({row.miniature})"


# -- the list --------------------------------------------------------------------------------------
def index(kept: dict[str, dict[str, Any]]) -> str:
    """The page that lists all methods, by kind."""
    parts = [
        "# Methods",
        "Each is the one that its paper defines. What a method can't do it refuses with a reason, "
        "told on its page. The verdict is on what its paper claims; where brackets name a paper, "
        "on the claim of that one, among whose methods it is: [all claims](../claims.md). "
        "The same list in a terminal: `foveate methods`.",
    ]
    for title, rows in by_kind():
        lines = ["| method | what it does | claim |", "| --- | --- | --- |"]
        for row in rows:
            name = f"[{prose(row.title)}]({row.key}.md)<br>`{row.key}`"
            lines.append(f"| {name} | {cell(prose(row.summary))} | {verdict_of(row, kept)} |")
        parts += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def by_kind() -> list[tuple[str, list[Row]]]:
    """The catalog's rows under the names of their kinds, in the catalog's order."""
    groups: dict[str, list[Row]] = {title: [] for title in KINDS.values()}
    for row in catalog.rows():
        groups.setdefault(KINDS.get(row.kind, "Others"), []).append(row)
    return [(title, rows) for title, rows in groups.items() if rows]
