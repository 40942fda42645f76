"""Where a model attends: its attention modules, how they are numbered and how many heads they have.

A module counts if its `forward` asks transformers' AttentionInterface for its attention function:
only those can be given another one. Modules of one stack (a ModuleList of layers) are numbered as
the stack numbers them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from foveate.hf.errors import ModelError

_CROSS = re.compile(r"cross|encoder_attn|encdec|encoder_decoder", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """One attention module of a model.

    Attributes:
        name: its path in the model.
        stack: path of the list of layers that it stands in; "" outside any.
        layer: its number in the stack.
        order: its number among all of the model's, in the order of its modules.
        cross: whether it attends from one sequence to another.
        heads: number of query heads, where the module tells.
    """

    name: str
    stack: str
    layer: int
    order: int
    cross: bool
    heads: int | None


@lru_cache(maxsize=1024)
def _asks(kind: Callable[..., nn.Module]) -> bool:
    try:
        source = inspect.getsource(kind.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return False
    return "ALL_ATTENTION_FUNCTIONS" in source


def sites(model: nn.Module) -> dict[nn.Module, Site]:
    """The attention modules of a model, in the order of its modules.

    Raises:
        ModelError: it has none that take their attention function from transformers.
    """
    found: dict[nn.Module, Site] = {}
    counts: dict[tuple[str, bool], list[int]] = {}
    places: list[tuple[nn.Module, str, str, int, bool]] = []
    for name, module in model.named_modules():
        if not _asks(type(module)):  # type: ignore[arg-type]
            continue
        match = re.match(r"(.*?)\.?(\d+)(?:\.|$)", name)
        stack, number = (match[1], int(match[2])) if match else ("", 0)
        inner = name[match.end() :] if match else name
        cross = bool(_CROSS.search(f"{inner} {type(module).__name__}"))
        places.append((module, name, stack, number, cross))
        counts.setdefault((stack, cross), []).append(number)
    for order, (module, name, stack, number, cross) in enumerate(places):
        numbers = counts[(stack, cross)]
        if len(set(numbers)) < len(numbers):
            number = sum(p[2] == stack and p[4] == cross for p in places[:order])
        found[module] = Site(name, stack, number, order, cross, _heads(module))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no attention that takes its function from transformers' "
            "AttentionInterface, so foveate can't reach it. Use a model of transformers itself "
            "whose attention goes through that interface (most do), or foveate.Attention in your "
            "own."
        )
    return found


def _heads(module: nn.Module) -> int | None:
    config = getattr(module, "config", None)
    names = ("num_heads", "num_attention_heads", "n_heads")
    for owner in (module, config):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


def self_stacks(found: dict[nn.Module, Site]) -> list[str]:
    """The stacks that attend to themselves, in order."""
    return list(dict.fromkeys(site.stack for site in found.values() if not site.cross))
