"""Hierarchical self-attention (arXiv 2509.15448)."""

from foveate.methods.hsa.columns import columns
from foveate.methods.hsa.method import HSA
from foveate.methods.hsa.solve import Solution, solve

__all__ = ["HSA", "Solution", "columns", "solve"]
