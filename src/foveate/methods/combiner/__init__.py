"""Combiner: full attention with the cost of a sparse pattern; arXiv 2107.05768."""

from foveate.methods.combiner.method import Combiner, CombinerAttention

__all__ = ["Combiner", "CombinerAttention"]
