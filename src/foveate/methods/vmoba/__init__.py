"""VMoBA: mixture of block attention for video diffusion models (arXiv 2506.23858)."""

from foveate.methods.vmoba.pattern import VMoBA

__all__ = ["VMoBA"]
