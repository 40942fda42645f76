"""MInference's and MMInference's patterns for prefill, and the search that gives each head its own.

Jiang et al. 2024, arXiv 2407.02490: A-shape, vertical-slash and block-sparse. Li et al. 2025
(MMInference), arXiv 2504.16083: grid, and boundaries between modalities. Training-free: each head
runs a pattern of a given budget, and the dynamic ones estimate, online, where it goes. Patterns are
per query head. Decoding (one query against a cache) is dense.
"""

from foveate.methods.mminference.a_shape import AShape, TriShape
from foveate.methods.mminference.assigned import MMInference
from foveate.methods.mminference.block_sparse import BlockSparse
from foveate.methods.mminference.boundary import QBoundary, TwoDBoundary
from foveate.methods.mminference.grid import Grid
from foveate.methods.mminference.vertical_slash import VerticalSlash

__all__ = [
    "AShape", "BlockSparse", "Grid", "MMInference", "QBoundary", "TriShape", "TwoDBoundary",
    "VerticalSlash",
]  # fmt: skip
