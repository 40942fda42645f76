"""Gaussian adaptive attention (GAAM): a learnt gate on features far from their group's mean."""

from foveate.methods.gaam.gate import GaussianGate
from foveate.methods.gaam.importance import Importance, importance_factor

__all__ = ["GaussianGate", "Importance", "importance_factor"]
