"""Methods from text: "sink-window(window=1024)", and back.

The arguments are Python literals, read without running anything.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

from foveate import catalog
from foveate.ops.errors import InputError, nearest
from foveate.ops.syntax import parse_expression
from foveate.parts.attention import AttentionRecipe
from foveate.parts.mixer import MixerRecipe
from foveate.parts.pooler import PoolerRecipe
from foveate.parts.projection import Recipe
from foveate.parts.routing import RouterRecipe

_SPEC = re.compile(r"\s*([^\s()]+)\s*(\(.*\))?\s*", re.DOTALL)
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def make(spec: str) -> Any:
    """The method that a text names, such as "full" or "sink-window(window=1024)".

    Args:
        spec: a key of the catalog, optionally with hyper-parameters by name.

    Returns:
        An instance of the method's class.

    Raises:
        UnknownMethodError: no method has that key; the nearest ones are offered.
        InputError: the text can't be read, or a hyper-parameter doesn't exist or doesn't fit.
    """
    if not isinstance(spec, str):
        raise InputError(
            f'A method is named by a text such as "sink-window(window=1024)", got '
            f"{type(spec).__name__}."
        )
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise InputError(
            f"{spec!r} can't be read as a method; expected a key, or a key with hyper-parameters "
            'such as "sink-window(window=1024)".'
        )
    key, arguments = match[1], match[2] or "()"
    method = catalog.get(key).load()
    values = _read(spec, arguments)
    known = [field.name for field in dataclasses.fields(method) if field.init]
    for name in values:
        if name not in known:
            raise InputError(f"{key} has no hyper-parameter {name!r}; {_hint(name, known)}")
    try:
        return method(**values)
    except TypeError as error:
        raise InputError(f"{spec!r}: {error}.") from error


def make_attention(spec: str) -> Any:
    """As `make`, for a place that runs an attention on q, k and v: a model in use, or a comparison.

    Raises:
        UnknownMethodError: no method has that key; the nearest ones are offered.
        InputError: as `make`; or the method has weights that a model is built and trained with.
    """
    method = make(spec)
    row = catalog.get(_key(spec))
    if row.kind == "study":
        raise InputError(
            f"{spec!r} is a study, which looks into models and takes no attention's place; it is "
            f"reached by {', '.join(row.jobs)}. What can run in a model that is trained already is "
            "listed by: foveate methods."
        )
    if isinstance(method, AttentionRecipe):
        raise InputError(
            f"{spec!r} has parameters of its own that a model must be trained with: build it by "
            "foveate.Attention(dim, num_heads, attention=...) or foveate train --attention. What "
            "can run in a model that is trained already is listed by: foveate methods."
        )
    if isinstance(method, MixerRecipe):
        raise InputError(
            f"{spec!r} is a mixer: it takes attention's place in a model that is built and trained "
            "with it, by foveate.models.FoveateConfig(mixer=...) or foveate train --mixer. What "
            "can run in a model that is trained already is listed by: foveate methods."
        )
    if isinstance(method, PoolerRecipe):
        raise InputError(
            f"{spec!r} is a pooler: it makes one vector of a text's tokens in an encoder that is "
            "trained with it, by foveate.models.FoveateEncoderConfig(pooling=...). What can run in "
            "a model that is trained already is listed by: foveate methods."
        )
    if isinstance(method, RouterRecipe):
        raise InputError(
            f"{spec!r} is a router of experts: a model is trained with it, by "
            "foveate.models.FoveateConfig(router=..., moe_layers=...) or foveate train --router. "
            "What can run in a model that is trained already is listed by: foveate methods."
        )
    if isinstance(method, Recipe):
        raise InputError(
            f"{spec!r} is a projection: it has weights of its own, so a model must be built and "
            "trained with it, by foveate.Attention(dim, num_heads, projection=...) or foveate "
            "train. What can run in a model that is trained already is listed by: foveate methods."
        )
    if row.kind == "retriever":
        raise InputError(
            f"{spec!r} is a retriever: it stands behind a text encoder and makes what is kept of "
            "texts, by foveate index. What can run in a model that is trained already is listed "
            "by: foveate methods."
        )
    if not {"use", "compare"} & set(row.jobs):
        raise InputError(
            f"{spec!r} computes something else than the softmax that a trained model was trained "
            "with: train one with it, by foveate.Attention(dim, num_heads, attention=...) or "
            "foveate train --attention. What can run in a model that is trained already is listed "
            "by: foveate methods."
        )
    return method


def _key(spec: str) -> str:
    """The catalog's key in a text that `make` has read."""
    return spec.partition("(")[0].strip()


def _hint(name: str, known: list[str]) -> str:
    if not known:
        return "it has none."
    hint, listed = nearest(name, known), ", ".join(known)
    return f"{hint} It has {listed}." if hint.endswith("?") else f"it has {listed}."


def _read(spec: str, arguments: str) -> dict[str, Any]:
    """The keyword arguments of "(name=literal, ...)"."""
    try:
        call = parse_expression(f"f{arguments}")
    except SyntaxError as error:
        raise InputError(f"{spec!r} can't be read: {error.msg}.") from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise InputError(f"{spec!r} can't be read; expected one pair of parentheses after the key.")
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise InputError(f"{spec!r}: ** isn't allowed; write the hyper-parameters out.")
        if keyword.arg in values:
            raise InputError(f"{spec!r}: {keyword.arg} is given twice.")
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError as error:
            text = ast.unparse(keyword.value)
            raise InputError(
                f"{spec!r}: {keyword.arg}={text} is no plain value; expected a number, text, True, "
                "False, None or a list of them."
            ) from error
    if call.args:
        raise InputError(
            f"{spec!r}: name the hyper-parameters, as in "
            f'"sink-window(window={ast.unparse(call.args[0])})".'
        )
    return values


def split(text: str) -> list[str]:
    """The parts of a comma-separated list, commas in parentheses and quotes left alone.

        split("sink-window(window=1024),vertical-slash") -> ["sink-window(window=1024)", ...]

    Raises:
        InputError: a parenthesis or a quote isn't closed, or a part is empty.
    """
    parts, start = [], 0
    open_: list[str] = []
    quote = ""
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in _PAIRS:
            open_.append(_PAIRS[letter])
        elif letter in _PAIRS.values():
            if not open_ or open_.pop() != letter:
                raise InputError(f"{text!r}: the {letter!r} at {at} closes nothing.")
        elif letter == "," and not open_:
            parts.append(text[start:at])
            start = at + 1
    if open_ or quote:
        raise InputError(f"{text!r}: a {quote or open_[-1]!r} is missing.")
    parts = [part.strip() for part in (*parts, text[start:])]
    if not all(parts):
        raise InputError(f"{text!r}: a method is missing before or after a comma.")
    return parts


def make_all(text: str) -> list[Any]:
    """The methods of a comma-separated list; see `split` and `make`."""
    return [make(part) for part in split(text)]


def spec(method: Any) -> str:
    """The text from which `make` makes this method: its key and what isn't at its default.

    Raises:
        InputError: the method isn't in the catalog.
    """
    kind = type(method)
    for row in catalog.rows():
        if row.path.rpartition(".")[2] == kind.__name__ and row.load() is kind:
            break
    else:
        raise InputError(f"{kind.__name__} isn't in the catalog, so no text names it.")
    given = [
        f"{field.name}={getattr(method, field.name)!r}"
        for field in dataclasses.fields(kind)
        if field.init and getattr(method, field.name) != field.default
    ]
    return f"{row.key}({', '.join(given)})" if given else row.key
