"""Patterns told by their density, and how the command line names every pattern.

NAME@DENSITY is a pattern that visits about that share of all query-key pairs: `window@0.1`,
`documents@0.2`, `vertical-slash@0.1`, and the catalogue's `block-random@0.05`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from foveate.bench import catalogue
from foveate.bench.case import Case, from_layout, from_mask
from foveate.bench.catalogue import Settings
from foveate.ops import Layout, causal, documents, neighborhood, window
from foveate.ops.errors import InputError, nearest

DENSITIES = (0.05, 0.1, 0.2, 0.5)
_MOST_CAUSAL = 0.4


def window_of(density: float, s: Settings) -> Case:
    """|i - j| <= w with the w that comes nearest: (2w + 1) L - w (w + 1) = density L^2."""
    length = s.length
    # w^2 - (2L - 1) w + (density L^2 - L) = 0, the smaller root
    half = (2 * length - 1) / 2
    root = half - math.sqrt(max(0.0, half * half - (density * length * length - length)))
    wide = min(length - 1, max(0, round(root)))
    return from_mask(f"window@{density:g}", length, window(wide, wide))


def documents_of(density: float, s: Settings) -> Case:
    """Documents of one length, 1 / density of them, that fit no tile in general."""
    count = max(1, round(1 / density))
    bounds = [round(i * s.length / count) for i in range(count + 1)]
    return from_mask(f"documents@{density:g}", s.length, documents(bounds))


def neighborhood_of(density: float, s: Settings) -> Case:
    """On the squarest grid of L tokens, the nearest tokens of each in a rectangle of its shape."""
    length = s.length
    rows = next(n for n in range(math.isqrt(length), 0, -1) if length % n == 0)
    shape = (rows, length // rows)
    sides = tuple(max(1, min(n, round(n * math.sqrt(density)))) for n in shape)
    return from_mask(f"neighborhood@{density:g}", length, neighborhood(shape, sides))


def vertical_slash_of(density: float, s: Settings) -> Case:
    """Causal: half of the pairs in diagonals of tiles, half in single keys that all later rows see.

    The main diagonal is always there; the other diagonals and the keys are drawn.
    """
    length, random = s.length, torch.Generator().manual_seed(s.seed)
    drawn_keys = torch.randperm(length, generator=random)
    seen = (length - drawn_keys).cumsum(0)
    is_vertical = torch.zeros(length, dtype=torch.bool)
    is_vertical[drawn_keys[seen <= density / 2 * length * length]] = True

    def diagonals(tile: int) -> Tensor:
        count = -(-length // tile)
        drawn = torch.randperm(count - 1, generator=torch.Generator().manual_seed(s.seed + 1))
        index, left = torch.arange(count), density / 2 * length * length
        tiles = torch.zeros(count, count, dtype=torch.bool)
        for offset in [0, *(drawn + 1).tolist()]:
            if left <= 0:
                break
            tiles |= index[:, None] - index == offset
            left -= (count - offset) * tile * tile
        return tiles

    def build(tile: int) -> Layout:
        tiles = diagonals(tile)
        ends = (torch.arange(len(tiles)) + 1) * tile
        keys = is_vertical & (torch.arange(length) < ends[:, None])
        return Layout.from_selection(
            tiles[None, None], keys[None, None], length, length, tile, causal()
        )

    tiles, size = diagonals(s.tile), s.tile

    def seen_at(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (tiles[q // size, k // size] | is_vertical[k])

    return from_layout(f"vertical-slash@{density:g}", length, build, seen_at)


_TOLD: dict[str, Callable[[float, Settings], Case]] = {
    "window": window_of,
    "documents": documents_of,
    "vertical-slash": vertical_slash_of,
    "neighborhood": neighborhood_of,
}


def density_names() -> list[str]:
    """The patterns of the speed targets: five kinds at 5, 10, 20 and 50 percent."""
    kinds = ("window", "block-random", "documents", "vertical-slash", "neighborhood")
    return [
        f"{kind}@{density:g}"
        for kind in kinds
        for density in DENSITIES
        if kind != "vertical-slash" or density <= _MOST_CAUSAL
    ]


GROUPS: dict[str, Callable[[], Iterable[str]]] = {
    "catalogue": catalogue.names,
    "density": density_names,
    "targets": lambda: ["full", "causal", *density_names()],
    "all": lambda: [*catalogue.names(), *density_names()],
}


def expand(names: Iterable[str]) -> list[str]:
    """Names with groups (`catalogue`, `density`, `targets`, `all`) written out, each once.

    Raises:
        InputError: a name is unknown, or its density is not between 0 and 1.
    """
    found: dict[str, None] = {}
    for name in names:
        for one in GROUPS[name]() if name in GROUPS else [name]:
            kind, density = _parse(one)
            found[kind if density is None else f"{kind}@{density:g}"] = None
    return list(found)


def make(name: str, s: Settings) -> Case:
    """The case of a name.

    Raises:
        InputError: the name is unknown, or its density is not between 0 and 1.
    """
    kind, density = _parse(name)
    if density is None:
        return catalogue.make(kind, s)
    if kind in _TOLD:
        return _TOLD[kind](density, s)
    return catalogue.make_dynamic(kind, density, s)


def _parse(name: str) -> tuple[str, float | None]:
    kind, at, text = name.partition("@")
    if not at and (kind in catalogue.FIXED or kind == catalogue.EVICTION):
        return kind, None
    if kind not in _TOLD and kind not in catalogue.DYNAMIC:
        known = [*GROUPS, *catalogue.names(), *density_names()]
        raise InputError(f"mask {name!r} is not known; {nearest(name, known)}")
    try:
        density = float(text)
    except ValueError:
        density = math.nan
    if not 0 < density <= 1:
        raise InputError(
            f"mask {name!r}: expected a share of all pairs between 0 and 1, such as {kind}@0.1."
        )
    if kind == "vertical-slash" and density > _MOST_CAUSAL:
        raise InputError(
            f"mask {name!r}: it is causal, so holds at most half of all pairs; give at most "
            f"{_MOST_CAUSAL:g}."
        )
    return kind, density
