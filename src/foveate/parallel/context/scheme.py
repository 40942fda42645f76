"""Schemes by name: all-gather, ring, ulysses, usp, loongtrain, magi."""

from __future__ import annotations

from typing import Any

from foveate.ops.errors import InputError, nearest
from foveate.parallel.context.all_gather import AllGather
from foveate.parallel.context.group_cast import GroupCast
from foveate.parallel.context.ring import Ring
from foveate.parallel.context.ulysses import Ulysses

Scheme = Ring | AllGather | GroupCast | Ulysses

SCHEMES = {
    "all-gather": "every rank gets all keys; groups=1",
    "ring": "keys go round; window=None (w makes a double ring), overlap=True",
    "ulysses": "all-to-all: whole rows, some heads",
    "usp": "Ulysses inside groups of `ulysses` ranks, a ring between them; placement='head'",
    "loongtrain": "as usp, with a double ring of `window`; placement='head'",
    "magi": "keys go only to the ranks that see some of them; stages=1",
}


def scheme_of(given: str | Scheme) -> Scheme:
    """A scheme from its name, with its options: "usp(ulysses=2)", "ring(window=2)".

    Raises:
        InputError: no such scheme, or options that it doesn't have.
    """
    if not isinstance(given, str):
        return given
    name, options = _read(given)
    if name not in SCHEMES:
        raise InputError(f"scheme {name!r} is not known; {nearest(name, SCHEMES)}")
    try:
        if name == "all-gather":
            return AllGather(**options)
        if name == "ring":
            return Ring(**options)
        if name == "magi":
            return GroupCast(**options)
        if name == "ulysses":
            return Ulysses(**options)
        window, overlap = options.pop("window", None), options.pop("overlap", True)
        if name == "usp" and window is not None:
            raise TypeError("usp has no window; a double ring is loongtrain's")
        if name == "usp" and "ulysses" not in options:
            raise TypeError("usp needs ulysses=U, the ranks that share out heads")
        if name == "loongtrain" and window is None:
            raise TypeError("loongtrain needs window=w, the ranks of an inner ring")
        options.setdefault("ulysses", 1)
        return Ulysses(inner=Ring(window, overlap), **options)
    except TypeError as error:
        raise InputError(f"scheme {given!r}: {error}. Known: {name}: {SCHEMES[name]}.") from None


def _read(text: str) -> tuple[str, dict[str, Any]]:
    """(name, options), by hand: Python 3.11's `ast` fails when several threads parse at once."""
    name, opened, tail = text.strip().partition("(")
    if not opened:
        return name, {}
    options = {}
    try:
        if not tail.endswith(")"):
            raise ValueError("not closed")
        for part in filter(None, (x.strip() for x in tail[:-1].split(","))):
            key, equals, value = (x.strip() for x in part.partition("="))
            if not equals or not key.isidentifier():
                raise ValueError("options are named")
            options[key] = _value(value)
    except ValueError as error:
        raise InputError(f"scheme {text!r}: expected a name, or name(option=value).") from error
    return name, options


def _value(text: str) -> int | str | None:
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return int(text)


_WORDS = {"None": None, "True": True, "False": False}
