"""The text that is measured on: the one that is shipped, or the user's file."""

from __future__ import annotations

import hashlib
import lzma
import re
from dataclasses import dataclass
from pathlib import Path

from foveate.ops.errors import InputError

DATA = Path(__file__).resolve().parent.parent / "data"
DEFAULT_TITLE = "WikiText-2 test split (Wikipedia, CC BY-SA 3.0)"


@dataclass(frozen=True)
class Text:
    """A text with where it comes from; `sha256` (hex) is over what is measured."""

    title: str
    content: str
    sha256: str


def load_text(path: str | Path | None = None) -> Text:
    """The shipped text, or a UTF-8 file.

    Raises:
        InputError: there is no such file, it can't be read, it isn't UTF-8 text, or it is empty.
    """
    if path is None:
        title, content = DEFAULT_TITLE, default_text()
    else:
        title, content = f"file {Path(path).name}", _read(Path(path).expanduser())
    return Text(title, content, hashlib.sha256(content.encode()).hexdigest())


def default_text() -> str:
    """The shipped text, lightly detokenised; `data/wikitext2/README.md` says what it is."""
    packed = DATA / "wikitext2" / "wiki.test.tokens.xz"
    try:
        return detokenise(lzma.decompress(packed.read_bytes()).decode())
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise InputError(
            f"The shipped text {packed} is missing or damaged; reinstall foveate, or give --text."
        ) from error


def _read(path: Path) -> str:
    if path.is_dir():
        raise InputError(f"--text {path} is a folder; give a UTF-8 text file.")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"--text {path}: there is no such file.") from None
    except OSError as error:
        raise InputError(f"--text {path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"--text {path} is not UTF-8 text (byte {error.start}); convert it first."
        ) from error
    if "\0" in content:
        raise InputError(f"--text {path} holds NUL bytes: it is not a text.")
    if not content.strip():
        raise InputError(f"--text {path} is empty.")
    return content


_SIMPLE = (
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([.,:;?!%)\]}])"), r"\1"),
    (re.compile(r"([(\[{$£€#]) "), r"\1"),
    (re.compile(r" (n't|'s|'re|'ve|'ll|'d|'m|')(?=[ ,.;:?!]|$)"), r"\1"),
    (re.compile(r" n 't\b"), r"n't"),
    (re.compile(r" / "), "/"),
    (re.compile(r" – (?=\d)"), "–"),
)
_HEADING = re.compile(r"^((?:= )+)(.*?)((?: =)+)$")
_QUOTED = re.compile(r'" (.*?) "')


def detokenise(tokens: str) -> str:
    """WikiText's tokens as a text that reads naturally; loses nothing but blanks and marks."""
    lines = []
    for raw in tokens.split("\n"):
        line = raw.strip()
        if heading := _HEADING.match(line):
            bars = "=" * (len(heading[1]) // 2 + 1)
            line = f"{bars} {heading[2]} {bars}"
        line = _QUOTED.sub(r'"\1"', line)
        for pattern, replacement in _SIMPLE:
            line = pattern.sub(replacement, line)
        lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
