"""Dynamic hierarchical sparse attention (DHSA), Xiong et al. 2025, arXiv 2510.24606."""

from foveate.methods.dhsa.pattern import DHSA
from foveate.methods.dhsa.predictor import BoundaryPredictor

__all__ = ["DHSA", "BoundaryPredictor"]
