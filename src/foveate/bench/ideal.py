"""What a cell's speed is held against: counts of its work, and the ideal time of a sparse one."""

from __future__ import annotations

from typing import Any

from foveate.ops import Layout

# Products of size pairs x D: scores and output; the backward has five (scores again, dP, dV, dQ,
# dK) where the forward has two.
PRODUCTS = {"forward": 2, "backward": 5}


def useful_flops(layout: Layout, heads: int, head_dim: int, direction: str) -> float:
    """Operations on pairs that attend, for one sequence: 2 D for each pair and product."""
    return PRODUCTS[direction] / 2 * layout.flops(1, heads, head_dim)


def counts(layout: Layout) -> dict[str, Any]:
    """Pairs, visited area (tiles clipped to the lengths) and their shares of everything."""
    batches, heads = layout.groups
    rows = max(1, batches * heads * layout.q_tiles)
    return {
        "pairs": layout.pairs,
        "tile_area": layout.tile_area,
        "density": layout.density,
        "tile_density": layout.tile_density,
        "tiles_per_row": layout.cols.numel() / rows,
    }


def ideal_seconds(best_dense: float, layout: Layout) -> float:
    """Best dense time x visited tile area / all tile area."""
    return best_dense * layout.tile_density
