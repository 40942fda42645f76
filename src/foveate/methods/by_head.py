"""A pattern for each layer and head of a model, as one method: what `foveate inspect` suggests.

    by-head(file='foveate-inspect/suggestion.json')

The file is an assignment as `foveate.use` saves it:

    {"foveate": 1, "default": "full",
     "layers": {"0": "sink-window(window=256)", "1": {"0-4": "a-shape", "5,7": "full"}}}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from foveate.methods.naming import make_attention
from foveate.ops import AttentionOutput
from foveate.ops.errors import InputError
from foveate.parts.attention import Attention
from foveate.parts.by_heads import attend_by_heads
from foveate.parts.context import Context

VERSION = 1
Plan = dict[int, dict[str, str]]
Parts = list[tuple[tuple[int, ...] | None, Attention]]


def heads_of(text: object) -> tuple[int, ...]:
    """Heads such as "0-4,6" as (0, 1, 2, 3, 4, 6).

    Raises:
        InputError: it can't be read so, or a range runs backwards.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        text = str(text)
    numbers: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise InputError(
                f"can't read the heads {text!r}; expected numbers and ranges like '0-4,6'."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"the range of heads {part.strip()!r} runs backwards.")
        numbers.extend(range(first, last + 1))
    return tuple(numbers)


@dataclass(frozen=True)
class ByHead(Attention):
    """Each head by the pattern that a file names for it; layers without one run its default.

    A layer that is named has one pattern, or one for each of its heads.

    Attributes:
        file: an assignment, by layers' numbers; "" is full attention everywhere.

    Raises:
        InputError: there is no such file, it is no assignment, or names no known pattern.
    """

    file: str = ""
    default: str = field(default="full", init=False, compare=False, repr=False)
    digest: str = field(default="", init=False)
    _layers: Plan = field(default_factory=dict, init=False, compare=False, repr=False)
    _made: dict[int, Parts] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.file, str):
            raise InputError(f"ByHead(file={self.file!r}): expected the path of a file as text.")
        if not self.file:
            return
        path = Path(self.file).expanduser()
        try:
            content = path.read_bytes()
            data: Any = json.loads(content)
        except (OSError, ValueError) as error:
            raise InputError(
                f"by-head(file={self.file!r}) can't be read as an assignment: {error}. Make one by "
                "foveate inspect, or by foveate.use(model, assignment).save_pretrained(folder)."
            ) from error
        default, layers = _checked(data, self.file)
        object.__setattr__(self, "default", default)
        object.__setattr__(self, "_layers", layers)
        object.__setattr__(self, "digest", hashlib.sha256(content).hexdigest()[:16])

    @property
    def reserved(self) -> str:
        """What is kept whatever is chosen, in words."""
        return "what each head's pattern keeps"

    def split(self, layer: int) -> Parts:
        """(heads, pattern) of a layer; None as heads is all of them."""
        if layer not in self._made:
            named = self._layers.get(layer, {"": self.default})
            self._made[layer] = [
                (None if heads == "" else heads_of(heads), make_attention(text))
                for heads, text in named.items()
            ]
        return self._made[layer]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Each group of heads by its own pattern; shapes as in `Attention`.

        Raises:
            InputError: the file names other heads than this layer has, or the mask differs by head.
        """
        ctx = Context() if ctx is None else ctx
        parts = self.split(ctx.layer)
        if parts[0][0] is None:
            return parts[0][1](q, k, v, ctx)
        if ctx.mask is not None and ctx.mask.groups()[1] > 1:
            raise InputError("by-head takes masks that are the same for all heads.")
        total = q.shape[1]
        named = {heads: method for heads, method in parts if heads is not None}
        numbers = sorted(h for heads in named for h in heads)
        if numbers != list(range(total)):
            raise InputError(
                f"by-head(file={self.file!r}) names the heads {numbers} of layer {ctx.layer}, "
                f"which has heads 0 to {total - 1}; name each once, or give the layer one pattern."
            )
        return attend_by_heads(list(named.items()), q, k, v, ctx)


def _checked(data: Any, file: str) -> tuple[str, Plan]:
    """The default and the patterns by layer and heads ("" for all of a layer's)."""
    if not isinstance(data, Mapping) or data.get("foveate") != VERSION:
        raise InputError(
            f"by-head(file={file!r}): no assignment of this version; expected an object with "
            f'"foveate": {VERSION}.'
        )
    default, layers = data.get("default", "full"), data.get("layers", {})
    if not isinstance(default, str) or not isinstance(layers, Mapping):
        raise InputError(
            f'by-head(file={file!r}): expected "layers" to be an object and "default" a pattern.'
        )
    make_attention(default)
    made: Plan = {}
    for layer, what in layers.items():
        if not str(layer).isdecimal():
            raise InputError(
                f"by-head(file={file!r}): layers are numbers here, got {layer!r}; give the file to "
                "foveate.use, which knows the model's paths."
            )
        patterns = {"": what} if isinstance(what, str) else what
        if not isinstance(patterns, Mapping) or not patterns:
            raise InputError(f"by-head(file={file!r}): layer {layer} names no pattern.")
        if "" in patterns and len(patterns) > 1:
            raise InputError(
                f'by-head(file={file!r}): layer {layer} has "", which is all of its heads, beside '
                "others; name each head once."
            )
        seen: set[int] = set()
        for heads, text in patterns.items():
            make_attention(text)
            numbers = () if heads == "" else heads_of(heads)
            if seen.intersection(numbers) or len(set(numbers)) < len(numbers):
                raise InputError(
                    f"by-head(file={file!r}): layer {layer} has a head of {heads!r} twice."
                )
            seen.update(numbers)
        made[int(layer)] = dict(patterns)
    return default, made
