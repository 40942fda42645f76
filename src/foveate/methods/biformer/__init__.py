"""BiFormer's bi-level routing: regions choose regions, then tokens attend to tokens.

Source: Zhu et al. 2023, arXiv 2303.08810.
"""

from foveate.methods.biformer.pattern import BiLevelRouting
from foveate.methods.biformer.regions import Regions, grid_regions
from foveate.methods.biformer.routing import (
    affinity,
    region_layout,
    route,
    soft_attention,
    soft_weights,
)

__all__ = [
    "BiLevelRouting",
    "Regions",
    "affinity",
    "grid_regions",
    "region_layout",
    "route",
    "soft_attention",
    "soft_weights",
]
