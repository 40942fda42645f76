"""Which pattern each layer and head runs, as data that is saved beside the model's weights.

`foveate.json`:

    {"foveate": 1, "default": "full",
     "layers": {"0": "sink-window(window=256)",
                "1": {"0-4": "a-shape", "5,7": "vertical-slash"}}}

A layer's number is the one it has in its stack. Models with several stacks (an encoder and a
decoder) name the layer by its path, "model.encoder.layers.3". Heads that a layer doesn't name run
the default. Cross-attention is never assigned to by a number, only by its own path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from foveate.hf.errors import AssignmentError
from foveate.hf.places import Site, self_stacks
from foveate.methods import make, make_attention, spec
from foveate.methods.by_head import VERSION, heads_of
from foveate.ops.errors import InputError
from foveate.parts import Attention

FILE = "foveate.json"

Heads = tuple[tuple[tuple[int, ...], str], ...]


def _heads_of(text: object, where: str) -> tuple[int, ...]:
    """Heads such as 0-4,6 as (0, 1, 2, 3, 4, 6)."""
    try:
        return heads_of(text)
    except InputError as error:
        raise AssignmentError(f"{where}: {error}") from error


def _text(pattern: object) -> str:
    """A pattern as text, checked."""
    text = pattern if isinstance(pattern, str) else spec(pattern)
    make_attention(text)
    return text


@dataclass(frozen=True)
class Assignment:
    """A pattern for each layer and head of a model.

    Attributes:
        layers: layer -> pattern ("key", "key(field=value)", or a method of the catalog, which is
            kept as such a text), or {heads -> pattern} with heads like "0-4,6". A layer is its
            number, or the path of its module as a string.
        default: the pattern of whatever isn't named.
    """

    layers: Mapping[int | str, Any] = field(default_factory=dict)
    default: str = "full"

    def __post_init__(self) -> None:
        object.__setattr__(self, "default", _text(self.default))
        clean: dict[str, str | dict[str, str]] = {}
        for layer, what in self.layers.items():
            where, name = f"layer {layer}", str(layer)
            if name in clean:
                raise AssignmentError(f"{where} is named twice.")
            if isinstance(what, str | Attention):
                clean[name] = _text(what)
                continue
            if not isinstance(what, Mapping):
                raise AssignmentError(
                    f"{where}: expected a pattern such as 'sink-window(window=256)', or a pattern "
                    f"per heads such as {{'0-4': 'full'}}; got {what!r}."
                )
            taken: set[int] = set()
            for heads in what:
                numbers = _heads_of(heads, where)
                twice = taken.intersection(numbers) or len(set(numbers)) < len(numbers)
                if twice:
                    raise AssignmentError(f"{where}: a head of {heads!r} has two patterns.")
                taken.update(numbers)
            clean[name] = {str(heads): _text(pattern) for heads, pattern in what.items()}
        object.__setattr__(self, "layers", clean)

    # -- as a file ------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Write the assignment; a folder (of `save_pretrained`, say) gets `foveate.json` in it.

        Returns:
            The file.
        """
        target = Path(path)
        if target.suffix != ".json":
            target.mkdir(parents=True, exist_ok=True)
            target = target / FILE
        data = {"foveate": VERSION, "default": self.default, "layers": dict(self.layers)}
        target.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Assignment:
        """Read an assignment from a file, or from the `foveate.json` of a folder.

        Raises:
            AssignmentError: there is none, or it can't be read as one.
        """
        source = Path(path)
        if source.is_dir():
            source = source / FILE
        if not source.is_file():
            raise AssignmentError(
                f"There is no assignment at {source}; write one with Assignment(...).save(folder)."
            )
        try:
            data: Any = json.loads(source.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AssignmentError(f"{source} can't be read as JSON: {error}.") from error
        if not isinstance(data, dict) or data.get("foveate") != VERSION:
            raise AssignmentError(
                f'{source} is no assignment of this version: expected an object with "foveate": '
                f"{VERSION}."
            )
        layers, default = data.get("layers", {}), data.get("default", "full")
        if not isinstance(layers, dict) or not isinstance(default, str):
            raise AssignmentError(
                f'{source}: expected "layers" to be an object and "default" a pattern.'
            )
        return cls(layers, default)

    # -- on a model -------------------------------------------------------------------------------
    def resolve(self, found: Mapping[nn.Module, Site]) -> dict[nn.Module, list[HeadGroup]]:
        """The pattern of every attention module, per group of heads.

        Args:
            found: the model's attention modules (see `foveate.hf.sites`).

        Raises:
            AssignmentError: a layer or a head doesn't exist, or a number is ambiguous.
        """
        stacks = self_stacks(dict(found))
        left = dict(self.layers)
        plan: dict[nn.Module, list[HeadGroup]] = {}
        for module, site in found.items():
            key = self._key(site, stacks)
            what: str | Mapping[int | str, str] = "full" if site.cross else self.default
            if key is not None:
                what = self.layers[key]
                left.pop(key, None)
            plan[module] = self._groups(what, site)
        if left:
            self._unknown(sorted(left, key=str), found, stacks)
        return plan

    def _key(self, site: Site, stacks: list[str]) -> str | None:
        path = f"{site.stack}.{site.layer}" if site.stack else site.name
        if site.name in self.layers:
            return site.name
        if site.cross:
            return None
        if path in self.layers:
            return path
        if str(site.layer) in self.layers and stacks == [site.stack]:
            return str(site.layer)
        return None

    def _groups(self, what: str | Mapping[int | str, str], site: Site) -> list[HeadGroup]:
        if isinstance(what, str):
            return [HeadGroup(None, make_attention(what))]
        groups: list[HeadGroup] = []
        named: set[int] = set()
        for heads, pattern in what.items():
            numbers = _heads_of(heads, site.name)
            if site.heads is not None and max(numbers) >= site.heads:
                raise AssignmentError(
                    f"{site.name} has heads 0 to {site.heads - 1}, but the assignment names head "
                    f"{max(numbers)}."
                )
            named.update(numbers)
            groups.append(HeadGroup(numbers, make_attention(pattern)))
        if site.heads is None:
            raise AssignmentError(
                f"{site.name} doesn't tell its number of heads; assign one pattern to the layer."
            )
        rest = tuple(h for h in range(site.heads) if h not in named)
        if rest:
            groups.append(HeadGroup(rest, make_attention(self.default)))
        return groups

    def _unknown(
        self, left: list[int | str], found: Mapping[nn.Module, Site], stacks: list[str]
    ) -> None:
        names = ", ".join(str(k) for k in left)
        if len(stacks) > 1 and any(str(k).isdigit() for k in left):
            example = next(s for s in found.values() if not s.cross)
            raise AssignmentError(
                f"Layer {names} is ambiguous: the model has the stacks {', '.join(stacks)}. Name a "
                f"layer by its path, such as '{example.stack}.{example.layer}'."
            )
        numbers = sorted({s.layer for s in found.values() if not s.cross})
        raise AssignmentError(
            f"The model has no layer {names}; it attends in layers {_ranges(numbers)}."
        )


@dataclass(frozen=True)
class HeadGroup:
    """Query heads of one layer (None is all) and what they run."""

    heads: tuple[int, ...] | None
    method: Attention


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in spans)


def found_beside(model: Any) -> Assignment:
    """The assignment in the folder that a model's weights came from.

    Raises:
        AssignmentError: they came from no folder, or there is none in it.
    """
    folder = str(getattr(model.config, "_name_or_path", None) or "")
    if not folder or not (Path(folder) / FILE).is_file():
        raise AssignmentError(
            f"use(model) without a pattern looks for {FILE} in the folder that the model was "
            f"loaded from ({folder or 'none'}), and there is none. Give a pattern, such as "
            "foveate.use(model, 'sink-window'), or the folder's path; "
            "foveate.use(...).save_pretrained(folder) writes one."
        )
    return Assignment.load(folder)


def is_path(pattern: object) -> bool:
    """Whether a pattern is a path: a Path, or a text with a slash or .json where a key has none."""
    if isinstance(pattern, Path):
        return True
    if not isinstance(pattern, str):
        return False
    head = pattern.partition("(")[0]
    return "/" in head or "\\" in head or pattern.endswith(".json")


def assignment_of(
    pattern: str | Attention | Assignment, sites: Iterable[Site], cross: bool
) -> Assignment:
    """A pattern as an assignment that says the same; `cross` as in `plan_of`.

    Raises:
        InputError: an attention that isn't in the catalog, which no text names.
    """
    if isinstance(pattern, Assignment):
        return pattern
    text = _text(pattern)
    return Assignment({s.name: text for s in sites if s.cross and cross}, text)


def plan_of(
    pattern: str | Attention | Assignment, found: Mapping[nn.Module, Site], cross: bool
) -> dict[nn.Module, list[HeadGroup]]:
    """What every attention module runs.

    Args:
        pattern: "key", "key(field=value)", an attention, or an assignment.
        found: the model's attention modules.
        cross: whether a single pattern holds for cross-attention too; otherwise that stays full.
    """
    if isinstance(pattern, Assignment):
        return pattern.resolve(found)
    if isinstance(pattern, str):
        make_attention(pattern)

        def one() -> Attention:
            return make_attention(pattern)
    elif isinstance(pattern, Attention):

        def one() -> Attention:
            return pattern
    else:
        raise InputError(
            f"use(model, pattern): expected a pattern's key, an attention or an Assignment, got "
            f"{type(pattern).__name__}."
        )
    return {
        module: [HeadGroup(None, one() if cross or not site.cross else make("full"))]
        for module, site in found.items()
    }


def by_heads(
    plan: dict[nn.Module, list[HeadGroup]], found: Mapping[nn.Module, Site]
) -> dict[nn.Module, list[HeadGroup]]:
    """The same plan, with methods that run each head by its own pattern told apart by heads.

    Raises:
        AssignmentError: such a method for some heads of a layer only, or for more than there are.
    """
    made: dict[nn.Module, list[HeadGroup]] = {}
    for module, groups in plan.items():
        site = found[module]
        made[module] = []
        for group in groups:
            parts = group.method.split(site.layer)
            if parts is None:
                made[module].append(group)
                continue
            if group.heads is not None:
                raise AssignmentError(
                    f"{site.name}: {spec(group.method)} knows a pattern for each head, so it is "
                    "for whole layers."
                )
            most = max((max(heads) for heads, _ in parts if heads), default=0)
            if site.heads is not None and most >= site.heads:
                raise AssignmentError(
                    f"{site.name} has heads 0 to {site.heads - 1}, but what was found names {most}."
                )
            named = {h for heads, _ in parts if heads for h in heads}
            if named and site.heads is not None and len(named) < site.heads:
                missing = _ranges(sorted(set(range(site.heads)) - named))
                raise AssignmentError(
                    f"{site.name}: what was found names no pattern for heads {missing}; name all "
                    "of a layer's heads, or give it one pattern."
                )
            one = len(parts) == 1
            made[module] += [HeadGroup(None if one else heads, part) for heads, part in parts]
    return made
