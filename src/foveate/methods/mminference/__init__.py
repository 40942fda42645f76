"""MInference's head patterns for prefill: A-shape, vertical-slash and block-sparse.

Jiang et al. 2024, arXiv 2407.02490; Li et al. 2025 (MMInference), arXiv 2504.16083. Training-free:
each head runs a pattern of a given budget, and the two dynamic ones estimate, online, where it
goes. Patterns are per query head. Decoding (one query against a cache) is dense.
"""

from foveate.methods.mminference.a_shape import AShape
from foveate.methods.mminference.block_sparse import BlockSparse
from foveate.methods.mminference.vertical_slash import VerticalSlash

__all__ = ["AShape", "BlockSparse", "VerticalSlash"]
