"""MoBA: mixture of block attention for long-context language models (arXiv 2502.13189)."""

from foveate.methods.moba.pattern import MoBA

__all__ = ["MoBA"]
