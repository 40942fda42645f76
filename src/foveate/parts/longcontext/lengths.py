"""Document lengths of packed sequences, drawn from the distributions in `data/bench`."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from foveate.ops.errors import InputError, nearest

_FILE = Path(__file__).resolve().parents[2] / "data" / "bench" / "documents.json"


@lru_cache(maxsize=1)
def _distributions() -> dict[str, list[dict[str, Any]]]:
    found = json.loads(_FILE.read_text())
    return {name: parts for name, parts in found.items() if name != "about"}


def distributions() -> list[str]:
    """Names of the distributions."""
    return list(_distributions())


def draw_documents(length: int, distribution: str, seed: int = 0) -> tuple[int, ...]:
    """Boundaries (0, ..., length) of documents that fill a sequence, the last one cut to fit.

    Raises:
        InputError: there is no such distribution.
    """
    known = _distributions()
    if distribution not in known:
        raise InputError(
            f"document lengths {distribution!r} are not known; {nearest(distribution, known)}"
        )
    parts = known[distribution]
    random = torch.Generator().manual_seed(seed)
    weights = torch.tensor([part["weight"] for part in parts])
    bounds = [0]
    while bounds[-1] < length:
        part = parts[int(torch.multinomial(weights, 1, generator=random))]
        if part["kind"] == "log-normal":
            normal = float(torch.randn((), generator=random, dtype=torch.float64))
            size = math.exp(part["mu"] + part["sigma"] * normal)
        else:
            share = float(torch.rand((), generator=random, dtype=torch.float64))
            size = part["low"] + share * (part["high"] - part["low"])
        bounds.append(min(length, bounds[-1] + max(1, round(size))))
    return tuple(bounds)
