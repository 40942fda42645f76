"""Texts that stand once, in a file of the checkout, and are shown in pages of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"^--8<-- ([\w./]+)(?:: (.+))?$", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")
PICTURES = {
    f"pictures/{path.parent.name}-{path.name}": path
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.png"))
}

SOURCES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")

# Where files of the checkout are in the site.
PLACES = {
    "benchmarks/README.md": "performance.md",
    "benchmarks": "performance.md",
    "docs/claims.md": "claims.md",
    "CONTRIBUTING.md": "add-a-method.md",
    "README.md": "index.md",
    **{path.relative_to(ROOT).as_posix(): name for name, path in PICTURES.items()},
}


def filled(markdown: str, page: str) -> str:
    """A page's text with the shared texts in their places.

    Args:
        markdown: with lines `--8<-- FILE` or `--8<-- FILE: Heading`.
        page: its path in the site, such as guides/adopter.md.

    Raises:
        ValueError: a file has no such heading, or links to a file that the site doesn't have.
    """

    def put(match: re.Match[str]) -> str:
        name, heading = match[1], match[2]
        text = (ROOT / name).read_text(encoding="utf-8")
        text = body(text) if heading is None else cut(text, heading.strip())
        return linked(text, name, page).strip()

    return LINE.sub(put, markdown)


def body(text: str) -> str:
    """A file's text below its title."""
    return re.sub(r"\A# .*\n", "", text)


def cut(text: str, heading: str) -> str:
    """What stands under a heading of the second level, without it.

    Raises:
        ValueError: there is no such heading.
    """
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL
    )
    if found is None:
        raise ValueError(f"no heading '## {heading}'")
    return found[1]


def linked(text: str, source: str, page: str) -> str:
    """The text of `source` with links that fit a page of the site."""
    return LINK.sub(lambda link: link[1] + moved(link[2], source, page) + link[3], text)


def moved(target: str, source: str, page: str) -> str:
    """A link of `source`, a file of the checkout, as it must read on a page of the site.

    Raises:
        ValueError: there is no such file.
    """
    if "://" in target:
        return target
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path not in PLACES and not (ROOT / path).is_file():
        raise ValueError(f"{source} links to {target}, which has no place in the site")
    return posixpath.relpath(PLACES.get(path, f"files/{path}"), posixpath.dirname(page) or ".")


def attached() -> dict[str, Path]:
    """Files of the checkout that shared texts link to and that are no part of the site otherwise.

    By their path in the site.
    """
    found: dict[str, Path] = {}
    waiting = list(SOURCES)
    while waiting:
        source = waiting.pop()
        for _, target, _ in LINK.findall((ROOT / source).read_text(encoding="utf-8")):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
            name = f"files/{path}"
            if "://" in target or path in PLACES or name in found or not (ROOT / path).is_file():
                continue
            found[name] = ROOT / path
            waiting += [path] if path.endswith(".md") else []
    return found
