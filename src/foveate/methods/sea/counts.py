"""SEA's work, counted in floating-point operations; every part is linear in the length."""

from __future__ import annotations

from typing import NamedTuple

from foveate.methods.sea.method import SEA
from foveate.methods.sea.performer import CHUNK, feature_count
from foveate.parts.attention import Heads


class Flops(NamedTuple):
    """Of one sequence's forward: the Performer, encoder, rows, CNN, and exact attention."""

    performer: float
    encoder: float
    rows: float
    cnn: float
    attention: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)

    @property
    def estimator(self) -> float:
        """All but exact attention."""
        return self.total - self.attention


def flops(recipe: SEA, heads: Heads, length: int, pairs: float | None = None) -> Flops:
    """Multiplications and additions at a length.

    Args:
        recipe: of the layer.
        heads: its sizes.
        length: L.
        pairs: (query, key) pairs of a head that attend, as a layout counts them; None is k for each
            query.
    """
    h, d, dv, k = heads.query, heads.key_dim, heads.value_dim, recipe.width
    features, wide = feature_count(d, recipe.divisor), d + dv
    channels, factor = (2, 4) if recipe.causal else (4, 2)
    width, inner = k // factor, channels * h
    each = 4 * features * wide + 4 * features * d
    if recipe.causal:  # triangles of chunks
        each += CHUNK * 2 * (features + wide)
    taps = 9 * inner * inner * width
    if recipe.causal:
        cnn = 2 * (2 * taps + inner * h * (k + 2))
    else:  # half the rows in the first two
        cnn = 2 * (taps + 9 * inner * h * width)
    pairs = length * min(recipe.k, length) if pairs is None else pairs
    return Flops(
        performer=float(length * h * each),
        encoder=2.0 * length * h * (d + 2 * dv) * 2 * d,
        rows=2.0 * length * h * 2 * d * channels * width,
        cnn=float(length * cnn),
        attention=2.0 * h * pairs * (d + dv),
    )
